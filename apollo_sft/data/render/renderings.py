"""Hold the renderings of one conversation, and one turn in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apollo_sft.data.render.reply_format import Render, ReplyFormat
from apollo_sft.data.render.sandbox import RenderError
from apollo_sft.types import Message


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

    @classmethod
    def at_end(cls, renderings: Renderings, index: int, context: str, reply: str, lacks_prefill: bool = False) -> Turn:
        """Return the turn of a context and of the reply with which the rendering of its message ends."""
        target = _through_last_stop(reply, renderings.format)
        return cls.of_parts(renderings, (index, index + 1), context, target, reply[len(target) :], lacks_prefill)

    @classmethod
    def of_parts(
        cls,
        renderings: Renderings,
        place: tuple[int, int],
        context: str,
        target: str,
        rest: str,
        lacks_prefill: bool = False,
    ) -> Turn:
        """Return a turn. `place`: the number of the message, and of the messages in the rendering that has it."""
        index, num_messages = place
        start = len(context)
        stop = renderings.format.stop_token(target)
        return cls(index, renderings, context + target, start, start, stop, rest, lacks_prefill, num_messages)


def _through_last_stop(reply: str, form: ReplyFormat) -> str:
    """Return a reply with which a rendering ends, without what follows its stop."""
    text = reply.rstrip()
    if form.document_end is not None and text.endswith(form.document_end):
        inner = form.without_document_end(text)
        if form.stop_token(inner):
            return inner
    return text
