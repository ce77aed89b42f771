r"""Find one turn as the model writes it at inference: the prompt before it, and the reply through its stop token.

At inference the model reads what the template makes of the messages before the turn, with a generation prompt. That is
the context, character by character. The reply is what the template writes for the turn's message. Mostly one rendering
holds both. Gemma 4 closes an empty block in the prompt that it writes in no reply, so two are joined:

    prompt       <|turn>user\n1 + 1?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>
    rendering    <|turn>user\n1 + 1?<turn|>\n<|turn>model\n2<turn|>\n
    turn         <|turn>user\n1 + 1?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>2<turn|>\n
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from apollo_sft.data.render.message_forms import has_reasoning, split_reasoning
from apollo_sft.data.render.reply_format import MARK, MARKUP, OTHER_MARK, Render, ReplyFormat
from apollo_sft.data.render.sandbox import RenderError
from apollo_sft.data.render.text_search import before_cut_token, common_length, first_token
from apollo_sft.types import REASONING_KEYS, Message

PIECE = re.compile(rf"{MARKUP.pattern}|\w+|.", re.DOTALL)
"""What a header is compared by, so that no tag and no word is cut in two."""


class UnprovableError(Exception):
    """The target of a turn cannot be found for certain. `turn` is the index of its message."""

    def __init__(self, turn: int, reason: str) -> None:
        super().__init__(reason)
        self.turn = turn


class Renderings:
    """The renderings of one conversation with the same template arguments, each made once."""

    def __init__(
        self, messages: Sequence[Message], render: Render, reply_format: ReplyFormat, arguments: dict[str, Any]
    ) -> None:
        self.messages = messages
        self.render = render
        self.format = reply_format
        self.arguments = arguments
        self._texts: dict[int, str] = {}
        self._prompts: dict[int, str] = {}

    def text(self, num_messages: int) -> str:
        """Return the rendering of the first `num_messages` messages, without a generation prompt."""
        if num_messages not in self._texts:
            self._texts[num_messages] = self.render(self.messages[:num_messages], False, self.arguments)
        return self._texts[num_messages]

    def prompt(self, num_messages: int) -> str:
        """Return the rendering of the first `num_messages` messages, with a generation prompt."""
        if num_messages not in self._prompts:
            self._prompts[num_messages] = self.render(self.messages[:num_messages], True, self.arguments)
        return self._prompts[num_messages]

    def changed(self, index: int, message: Message, num_messages: int) -> str:
        """Return the rendering in which `message` stands in the place of message `index`."""
        others = self.messages
        return self.render([*others[:index], message, *others[index + 1 : num_messages]], False, self.arguments)

    def first_readable(self, num_messages: int) -> int:
        """Return the least number of messages, `num_messages` or more, that the template accepts.

        Many templates refuse a conversation without a user, or one that begins with the assistant.
        Raises: RenderError, that of the first number, where it accepts none.
        """
        failure: RenderError | None = None
        for number in range(num_messages, len(self.messages) + 1):
            try:
                self.text(number)
            except RenderError as error:
                failure = failure or error
            else:
                return number
        assert failure is not None, "there is one number at least"
        raise failure


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One message as the template writes it when nothing follows: what the model writes at inference."""

    index: int
    """The number of the message."""

    renderings: Renderings
    """The renderings with the template arguments of this turn."""

    text: str
    """What the model has read and written: all through the stop token of this turn."""

    start: int
    """The character of `text` at which the reply starts."""

    target_start: int
    """The character of `text` at which the target starts: `start`, or behind the reasoning (data.thinking=none)."""

    stop: str | None
    """The stop token at the end of `text`, None where the template writes none."""

    rest: str
    """What the template writes behind `text` when nothing follows."""

    lacks_prefill: bool
    """See `spans.Span.lacks_prefill`."""

    num_messages: int
    """The least number of messages with which the template writes this turn."""


def find_turn(renderings: Renderings, index: int, answers_only: bool = False) -> Turn:
    """Return message `index` as the model writes it at inference. `answers_only`: the target is behind the reasoning.

    Raises: UnprovableError, RenderError.
    """
    turn = _find(renderings, index)
    if answers_only and has_reasoning(renderings.messages[index]):
        return replace(turn, target_start=max(turn.start, _answer_start(turn)))
    return turn


def _find(renderings: Renderings, index: int) -> Turn:
    end = renderings.first_readable(index + 1)
    rendering = renderings.text(end)
    if renderings.messages[index]["role"] != "assistant":
        start = _values_start(renderings, index, rendering, end)
        return _through_stop(renderings, index, end, rendering[:start], rendering[start:])

    prompt = _prompt(renderings, index)
    if prompt is not None and rendering.startswith(prompt):
        start = len(prompt) + _header_length(renderings, index, prompt, rendering[len(prompt) :], end)
        return _through_stop(renderings, index, end, rendering[:start], rendering[start:])
    return _joined(renderings, index, end, prompt)


def _answer_start(turn: Turn) -> int:
    """Return the character of `turn.text` at which the answer starts, behind the reasoning."""
    renderings = turn.renderings
    message = renderings.messages[turn.index]
    _, answer = split_reasoning(message.get("content") or "")
    if answer is not None:
        # The reasoning stands in the content, as the template writes it.
        return turn.text.rfind(answer.strip(), turn.start)

    rendering = renderings.text(turn.num_messages)
    without = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    marked = _marked(without, _mark_for(rendering))
    changed = renderings.changed(turn.index, message | marked, turn.num_messages)
    behind = len(rendering) - common_length(rendering, changed)
    return len(turn.text) + len(turn.rest) - behind


def _prompt(renderings: Renderings, index: int) -> str | None:
    """Return the prompt before message `index`, None where the template writes none for these messages."""
    if index == 0:
        # Nobody has written anything, so the model is not asked: a greeting stands in the conversation from the start.
        return None
    try:
        return renderings.prompt(index)
    except RenderError:
        return None


def _header_length(renderings: Renderings, index: int, prompt: str, reply: str, end: int) -> int:
    """Return the length of the role header at the start of `reply`, where the prompt lacks it.

    Some templates append no generation prompt behind a message of the assistant.
    """
    usual = renderings.format.usual_prompt(renderings.arguments)
    if prompt.endswith(usual) or prompt != _text_before(renderings, index):
        return 0
    longest = _values_start(renderings, index, prompt + reply, end) - len(prompt)
    return _common_header(usual, reply[:longest])


def _joined(renderings: Renderings, index: int, end: int, prompt: str | None) -> Turn:
    """Return a turn whose rendering does not begin with its prompt: the reply is found by its role header.

    Raises: UnprovableError, RenderError.
    """
    rendering = renderings.text(end)
    appended = _appended(renderings, index, prompt)
    longest = _values_start(renderings, index, rendering, end)
    start, length = longest, 0
    if appended.strip():
        start, length = find_header(appended, rendering, content_end(renderings, index - 1, rendering, end), longest)
        if not appended[:length].strip():
            raise UnprovableError(index, "the template does not begin this reply as its generation prompt does")

    reply = rendering[start:]
    if prompt is None:
        return _through_stop(renderings, index, end, rendering[:start], reply)
    prefill = appended[length:]
    if renderings.format.is_closed(appended, prefill):
        return _through_stop(renderings, index, end, prompt, reply)

    # The prompt opens a block that this reply does not continue. Behind the opening it would be read as reasoning.
    context = prompt.removesuffix(prefill)
    return _through_stop(renderings, index, end, context, reply, lacks_prefill=True)


def _appended(renderings: Renderings, index: int, prompt: str | None) -> str:
    """Return the generation prompt before message `index`, or the usual one where there is none."""
    before = _text_before(renderings, index)
    if prompt is not None and before is not None:
        cut = before_cut_token((before, prompt), common_length(before, prompt), renderings.format.control_tokens)
        if prompt[cut:].strip():
            return prompt[cut:]
    return renderings.format.usual_prompt(renderings.arguments)


def _text_before(renderings: Renderings, index: int) -> str | None:
    """Return the rendering of the messages before `index`, None where the template refuses them."""
    try:
        return renderings.text(index)
    except RenderError:
        return None


def find_header(header: str, text: str, earliest: int, latest: int) -> tuple[int, int]:
    """Return the character at which the longest beginning of `header` in `text[earliest:latest]` ends, and its length.

    Without one it is (latest, 0).
    """
    best = (latest, 0)
    first = PIECE.match(header)
    if first is None:
        return best

    at = text.find(first.group(), earliest, latest)
    while at >= 0:
        length = _common_header(header, text[at:latest])
        if length >= best[1]:
            best = (at + length, length)
        at = text.find(first.group(), at + 1, latest)
    return best


def _common_header(header: str, text: str) -> int:
    """Return the length of the longest beginning of `header`, in whole pieces, that `text` begins with."""
    length = 0
    for match in PIECE.finditer(header):
        if not text.startswith(match.group(), length):
            break
        length = match.end()
    return length


def _through_stop(
    renderings: Renderings, index: int, end: int, context: str, reply: str, lacks_prefill: bool = False
) -> Turn:
    """Return the turn of a context and a reply, which is cut at its stop.

    `end`: the number of messages in the rendering that ends with `reply`.
    """
    form = renderings.format
    target = _to_last_stop(reply, form)
    if end > index + 1:
        rendering = renderings.text(end)
        values_end = _values_end(renderings, index, rendering, end)
        target = _to_next_stop(reply, values_end - len(rendering) + len(reply), form)

    stop = form.stop_token(target)
    rest = reply[len(target) :]
    start = len(context)
    return Turn(index, renderings, context + target, start, start, stop, rest, lacks_prefill, end)


def _to_last_stop(reply: str, form: ReplyFormat) -> str:
    """Return a reply with which a rendering ends, without what follows its stop."""
    text = reply.rstrip()
    if form.document_end is not None and text.endswith(form.document_end):
        inner = form.without_document_end(text)
        if form.stop_token(inner):
            return inner
    return text


def _to_next_stop(reply: str, values_end: int, form: ReplyFormat) -> str:
    """Return a reply that other messages follow, through the first control token behind its values."""
    for at in range(values_end, len(reply)):
        token = first_token(reply[at:], form.control_tokens)
        if token is not None and form.has_stop:
            return reply[: at + len(token)]
        if token is not None:
            return reply[:at].rstrip()
    return reply.rstrip()


def _values_start(renderings: Renderings, index: int, rendering: str, end: int) -> int:
    """Return the character at which other values of the message change the rendering. Raises: UnprovableError."""
    marked = renderings.changed(index, _marked(renderings.messages[index], _mark_for(rendering)), end)
    start = common_length(rendering, marked)
    if start == len(rendering):
        raise UnprovableError(index, "the template does not write the content of the turn")
    return before_cut_token((rendering, marked), start, renderings.format.control_tokens)


def _values_end(renderings: Renderings, index: int, rendering: str, end: int) -> int:
    """Return the character behind which no value of the message changes the rendering."""
    marked = renderings.changed(index, _marked(renderings.messages[index], _mark_for(rendering)), end)
    longest = min(len(rendering), len(marked)) - common_length(rendering, marked)
    return len(rendering) - min(common_length(rendering[::-1], marked[::-1]), longest)


def content_end(renderings: Renderings, index: int, rendering: str, end: int) -> int:
    """Return the character at which the content of message `index` ends, or of the last one before it that is written.

    0 where none is written.
    """
    for earlier in range(index, -1, -1):
        # Something is appended, as templates look at how a content begins (`<tool_response>`).
        message = renderings.messages[earlier]
        longer = message | {"content": (message.get("content") or "") + _mark_for(rendering)}
        marked = renderings.changed(earlier, longer, end)
        if marked != rendering:
            return common_length(rendering, marked)
    return 0


def _mark_for(text: str) -> str:
    """Return a mark that does not occur in a text."""
    if MARK in text:
        return OTHER_MARK
    return MARK


def _marked(message: Message, mark: str) -> Message:
    """Return a message with `mark` in the place of its content, its reasoning, and the names and arguments of calls."""
    marked = message | {key: mark for key in ("content", *REASONING_KEYS) if message.get(key)}
    if not message.get("content") and "tool_calls" not in message:
        marked["content"] = mark
    if "tool_calls" in message:
        marked["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
    return marked


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    function: dict[str, Any] = call.get("function", call)
    arguments: Any = {mark: mark}
    if isinstance(function.get("arguments"), str):
        arguments = f'{{"{mark}": "{mark}"}}'
    marked = function | {"name": mark, "arguments": arguments}
    if "function" in call:
        return call | {"function": marked}
    return marked
