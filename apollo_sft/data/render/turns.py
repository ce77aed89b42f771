"""Find one turn in the rendering that ends with it: what the model writes there at inference. See `spans`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apollo_sft.data.render.reply_format import MARK, OTHER_MARK, Render, ReplyFormat
from apollo_sft.data.render.text_search import before_cut_token, common_length
from apollo_sft.types import Message

MARKED_KEYS = ("content", "reasoning_content", "thinking", "reasoning")
"""The keys of a message that a mark replaces."""


class UnprovableError(Exception):
    """The target of a turn cannot be found for certain. `turn` is the index of its message."""

    def __init__(self, turn: int, reason: str) -> None:
        super().__init__(reason)
        self.turn = turn


class Renderings:
    """The renderings of one conversation, each made once."""

    def __init__(self, messages: Sequence[Message], render: Render, reply_format: ReplyFormat) -> None:
        self.messages = messages
        self.render = render
        self.format = reply_format
        self._texts: dict[int, str] = {}

    def text(self, num_messages: int) -> str:
        """Return the rendering of the first `num_messages` messages, without a generation prompt."""
        if num_messages not in self._texts:
            self._texts[num_messages] = self.render(self.messages[:num_messages], False)
        return self._texts[num_messages]

    def marked(self, index: int, mark: str, num_messages: int) -> str:
        """Return the rendering in which `mark` replaces content and reasoning of message `index`."""
        message = self.messages[index]
        marked = message | {key: mark for key in MARKED_KEYS if key in message}
        return self.render([*self.messages[:index], marked, *self.messages[index + 1 : num_messages]], False)


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One message as the template writes it when nothing follows: what the model writes at inference."""

    index: int
    """The number of the message."""

    text: str
    """The rendering of all messages through this one, up to its stop token."""

    start: int
    """The character of `text` at which the target starts."""

    stop: str | None
    """The stop token at the end of `text`, None where the template writes none."""

    lacks_prefill: bool
    """See `spans.Span.lacks_prefill`."""


def find_turn(renderings: Renderings, index: int) -> Turn:
    """Return message `index` as the model writes it at inference.

    Raises: UnprovableError, RenderError.
    """
    rendering = renderings.text(index + 1)
    start, lacks_prefill = _target_start(renderings, index, rendering)
    text = _through_stop(rendering, renderings.format)

    if len(text) < start:
        # Only white space may be missing: an empty reply behind a prompt that ends with a new line.
        if rendering[:start].rstrip() != text:
            raise UnprovableError(index, "the turn ends inside its own prompt")
        text = rendering[:start]
    return Turn(index, text, start, renderings.format.stop_token(text[start:]), lacks_prefill)


def _through_stop(rendering: str, reply_format: ReplyFormat) -> str:
    """Return a rendering that ends with a reply, without what follows the stop of the reply."""
    text = rendering.rstrip()
    if reply_format.document_end is not None and text.endswith(reply_format.document_end):
        inner = reply_format.without_document_end(text)
        if reply_format.stop_token(inner):
            return inner
    return text


def _target_start(renderings: Renderings, index: int, rendering: str) -> tuple[int, bool]:
    """Return the character of `rendering` at which the target starts, and whether the reply lacks the prefill.

    The target starts behind the generation prompt, where the rendering has it. Some templates end the prompt with a
    prefill (`<think>\\n`) that they write in no reply: then it starts where prompt and rendering part, after the same
    earlier messages and the same role header. For a turn that is not the assistant's it starts with its content.
    """
    earlier_messages = renderings.messages[:index]
    if renderings.messages[index]["role"] != "assistant":
        return _content_start(renderings, index, rendering), False
    prompt = renderings.render(earlier_messages, True)
    if rendering.startswith(prompt):
        return len(prompt), False

    parting = common_length(prompt, rendering)
    parting = before_cut_token((prompt, rendering), parting, renderings.format.control_tokens)
    # A content that begins like the prefill is still content, so the target starts with it at the latest.
    start = min(parting, _content_start(renderings, index, rendering))

    earlier = renderings.format.without_document_end(renderings.text(index).rstrip())
    if len(earlier) > start or not rendering.startswith(earlier):
        raise UnprovableError(index, "the template writes the messages before the turn in another way once it follows")
    return start, True


def _content_start(renderings: Renderings, index: int, rendering: str) -> int:
    """Return the character at which another content changes the rendering."""
    content = renderings.messages[index].get("content") or ""
    mark = OTHER_MARK if content.startswith(MARK) else MARK
    marked = renderings.marked(index, mark, index + 1)
    start = common_length(rendering, marked)
    if start == len(rendering):
        raise UnprovableError(index, "the template does not write the content of the turn")
    return before_cut_token((rendering, marked), start, renderings.format.control_tokens)
