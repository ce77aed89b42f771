"""Where the targets are in the rendered text. What cannot be proven from renderings is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from apollo_sft.data.render.sandbox import RenderError, RunawayError
from apollo_sft.types import Message

Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text, always with the same template arguments."""
History = Literal["expand", "last_turn", "as_rendered"]

MARK = "\ue000"
"""Stands for the content of a message; a character of nobody's text, and no white space."""
OTHER_MARK = "\ue001"
WRITTEN = ("content", "reasoning_content", "thinking", "reasoning")
"""The keys of a message that a mark replaces."""


class UnprovableError(Exception):
    """A turn whose target cannot be found for certain. `turn` is the index of its message."""

    def __init__(self, turn: int, reason: str) -> None:
        super().__init__(reason)
        self.turn = turn


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a rendering: what the model says in message `turn`, through its stop token.

    `stop` is the text of the stop token, None where the template writes none. `second_stop`: the span goes on to a
    second end mark, the tokenizer's eos. `unopened`: the generation prompt goes on behind `start`, with an opening
    that the template does not write in a reply. `rewritten`: not what the model says at inference, but what the
    template makes of it once other messages follow.
    """

    turn: int
    start: int
    end: int
    stop: str | None
    second_stop: bool = False
    unopened: bool = False
    rewritten: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One rendering and the spans of its targets, in order. It holds the first `num_messages` messages."""

    text: str
    spans: Sequence[Span]
    num_messages: int


@dataclass(frozen=True, slots=True)
class Habits:
    """How a template ends a reply. `controls`: tokens that can be an end mark, longest first.

    `stops`: a reply ends with such a token of its own; else the start of the next message may be its end (GLM).
    `closing`: the mark that closes the whole text behind the stop of its last reply (Phi-3), None where there is none.
    `header`: what stands between a prompt and the content of its reply where the template has no generation prompt:
    there the model has to write it, so it is trained. Nothing but white space where the contents follow one another.
    """

    controls: tuple[str, ...]
    eos: str | None
    stops: bool
    closing: str | None
    header: str = ""

    @classmethod
    def of(cls, render: Render, controls: tuple[str, ...], eos: str | None) -> Habits:
        """Found out on a conversation of two marks."""
        probe = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        try:
            wholes = [render(probe, going_on) for going_on in (False, True)]
            prompts = [render(probe[:1], going_on) for going_on in (False, True)]
        except (RenderError, RunawayError):  # the first row will say so, by its name
            return cls(controls, eos, True, None)
        tail, going_on = (_marks_at_start(text.rpartition(MARK)[2], controls) for text in wholes)
        closing = tail[1] if len(tail) == 2 and going_on[:1] == tail[:1] and going_on[1:2] != tail[1:] else None
        has_prompt = prompts[0] != prompts[1] or not wholes[0].startswith(prompts[0])
        header = "" if has_prompt else wholes[0].removeprefix(prompts[0]).partition(MARK)[0].strip()
        return cls(controls, eos, bool(tail), closing, header)

    def stop_of(self, text: str) -> str | None:
        """The token at the end of `text` that ends a reply."""
        return _token_at_end(text, self.controls) if self.stops else None


class Dialogue:
    """The renderings of one conversation, each made once."""

    def __init__(self, messages: Sequence[Message], render: Render, habits: Habits) -> None:
        self.messages = messages
        self.render = render
        self.habits = habits
        self._texts: dict[int, str] = {}

    def text(self, num_messages: int) -> str:
        """The rendering of so many messages, without a generation prompt."""
        if num_messages not in self._texts:
            self._texts[num_messages] = self.render(self.messages[:num_messages], False)
        return self._texts[num_messages]

    def marked(self, index: int, mark: str, num_messages: int) -> str:
        """The rendering of so many messages, content and reasoning of message `index` replaced by `mark`."""
        marked = self.messages[index] | {key: mark for key in WRITTEN if key in self.messages[index]}
        return self.render([*self.messages[:index], marked, *self.messages[index + 1 : num_messages]], False)


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Message `index` as the template writes it when nothing follows: what the model says at inference.

    `said` is that rendering through the stop token; the target starts at its character `start`.
    """

    index: int
    said: str
    start: int
    stop: str | None
    unopened: bool


def lay_out(dialogue: Dialogue, trained: Sequence[int], history: History) -> list[Text]:
    """The fewest renderings that hold each trained turn as inference would produce it, and its span in one of them.

    A rendering holds a turn when it starts with what the model sees and says in it. A template that rewrites earlier
    turns once others follow needs several renderings, each of which ends with one of the turns.

    Raises: UnprovableError, RenderError.
    """
    num_messages = len(dialogue.messages)
    left = [find_turn(dialogue, index) for index in trained]
    if history == "as_rendered":
        return [_as_rendered(dialogue, left)]
    texts: list[Text] = []
    while left or not texts:
        end = left[-1].index + 1 if left else num_messages
        held = _held(dialogue.text(end), left)
        if not texts and end < num_messages:
            in_whole = _held(dialogue.text(num_messages), left)
            end, held = (num_messages, in_whole) if set(held) <= set(in_whole) else (end, held)
        texts.append(_with_spans(dialogue, end, held))
        left = [turn for turn in left if turn not in held]
        if history != "expand":
            break
    return texts[::-1]


def _held(text: str, turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if text.startswith(turn.said)]


def find_turn(dialogue: Dialogue, index: int) -> Turn:
    """Raises: UnprovableError, RenderError."""
    alone = dialogue.text(index + 1)
    start, unopened = _start(dialogue, index, alone)
    habits = dialogue.habits
    said = alone.rstrip()
    if habits.closing is not None and said.endswith(habits.closing):
        inner = said.removesuffix(habits.closing).rstrip()
        said = inner if habits.stop_of(inner) else said
    if len(said) < start:
        if alone[:start].rstrip() != said:
            raise UnprovableError(index, "the turn ends inside its own prompt")
        said = alone[:start]
    return Turn(index, said, start, habits.stop_of(said[start:]), unopened)


def _start(dialogue: Dialogue, index: int, alone: str) -> tuple[int, bool]:
    """Where the target starts in `alone`, and whether the generation prompt goes on with another opening there.

    Behind the generation prompt, where the rendering has it. Some templates end the prompt with an opening
    (`<think>\\n`) that they write in no reply: then it starts where the two part, after the same earlier messages and
    the same role header. For a turn that is not the assistant's it starts with its content.
    """
    before = dialogue.messages[:index]
    if dialogue.messages[index]["role"] != "assistant":
        return _start_of_content(dialogue, index, alone), False
    prompt = dialogue.render(before, True)
    if alone.startswith(prompt):
        return len(prompt), False
    parts = _not_inside_a_token((prompt, alone), _common_length(prompt, alone), dialogue.habits.controls)
    start = min(parts, _start_of_content(dialogue, index, alone))
    earlier = dialogue.text(index).rstrip()
    if dialogue.habits.closing is not None:
        earlier = earlier.removesuffix(dialogue.habits.closing).rstrip()
    if len(earlier) > start or not alone.startswith(earlier):
        raise UnprovableError(index, "the template writes the messages before the turn in another way once it follows")
    return start, True


def _start_of_content(dialogue: Dialogue, index: int, alone: str) -> int:
    """Where replacing the content changes the rendering."""
    content = dialogue.messages[index].get("content") or ""
    marked = dialogue.marked(index, OTHER_MARK if content.startswith(MARK) else MARK, index + 1)
    start = _common_length(alone, marked)
    if start == len(alone):
        raise UnprovableError(index, "the template does not write the content of the turn")
    return _not_inside_a_token((alone, marked), start, dialogue.habits.controls)


def _with_spans(dialogue: Dialogue, num_messages: int, held: Sequence[Turn]) -> Text:
    text = dialogue.text(num_messages)
    return Text(text, [_span(turn, text, num_messages, dialogue.habits) for turn in held], num_messages)


def as_marked(text: Text, marked: Sequence[tuple[int, int]], habits: Habits) -> Text:
    """The text with the targets that the template's generation tags leave of it: never more than the model says.

    Raises: UnprovableError where they mark more, but for white space around it.
    """
    spans: list[Span] = []
    for span in text.spans:
        for first, last in marked:
            if first >= span.end or last <= span.start:
                continue
            more = text.text[first : span.start] + text.text[span.end : last]
            if more.strip():
                raise UnprovableError(span.turn, f"the template's generation tags mark what no model writes: {more!r}")
            start, end = max(first, span.start), min(last, span.end)
            if spans and (spans[-1].turn, spans[-1].end) == (span.turn, start):
                start = spans.pop().start
            stop = span.stop if end == span.end else habits.stop_of(text.text[start:end])
            spans.append(
                replace(span, start=start, end=end, stop=stop, second_stop=span.second_stop and end == span.end)
            )
    return replace(text, spans=spans)


def _as_rendered(dialogue: Dialogue, turns: Sequence[Turn]) -> Text:
    """The whole conversation, with each turn as it stands there."""
    num_messages = len(dialogue.messages)
    whole = dialogue.text(num_messages)
    held = _held(whole, turns)
    spans = [
        _span(turn, whole, num_messages, dialogue.habits) if turn in held else _rewritten(dialogue, turn, whole)
        for turn in turns
    ]
    return Text(whole, spans, num_messages)


def _rewritten(dialogue: Dialogue, turn: Turn, whole: str) -> Span:
    """A turn in the whole text, found by its content: from the role header before it to the stop behind it.

    Raises: UnprovableError.
    """
    marked = dialogue.marked(turn.index, MARK, len(dialogue.messages))
    first = _common_length(whole, marked)
    last = len(whole) - min(_common_length(whole[::-1], marked[::-1]), len(whole) - first)
    earlier = _common_length(dialogue.text(turn.index), turn.said)
    header = turn.said[earlier : turn.start]
    start = whole.rfind(header, 0, first) + len(header)
    end = whole.find(turn.stop or MARK, last)
    if turn.stop is None or start < len(header) or end < 0:
        raise UnprovableError(
            turn.index, "the template rewrites the turn once others follow, and marks its end otherwise"
        )
    return Span(turn.index, start, end + len(turn.stop), turn.stop, unopened=turn.unopened, rewritten=True)


def _span(turn: Turn, text: str, num_messages: int, habits: Habits) -> Span:
    """The span of a turn in a text that holds it, through the second end mark, or the one of the next message."""
    end, stop, second = len(turn.said), turn.stop, False
    if habits.stops and turn.index + 1 < num_messages:
        return Span(turn.index, turn.start, end, stop, unopened=turn.unopened)
    following = text[end:].lstrip()
    if stop is not None and turn.index + 1 == num_messages and habits.closing == habits.eos != stop:
        second = habits.eos is not None and following.rstrip() == habits.eos
    next_mark = next((mark for mark in habits.controls if following.startswith(mark)), None)
    if second or (not habits.stops and next_mark is not None):
        stop = next_mark or stop
        end = len(text) - len(following) + len(stop or "")
    return Span(turn.index, turn.start, end, stop, second, turn.unopened)


def _marks_at_start(text: str, controls: tuple[str, ...]) -> list[str]:
    """The tokens that `text` starts with, white space between them."""
    found: list[str] = []
    text = text.lstrip()
    while mark := next((control for control in controls if text.startswith(control)), None):
        found.append(mark)
        text = text.removeprefix(mark).lstrip()
    return found


def _token_at_end(text: str, controls: tuple[str, ...]) -> str | None:
    if not text.endswith(controls):
        return None
    for control in controls:
        if text.endswith(control):
            return control
    return None


def _not_inside_a_token(texts: tuple[str, str], end: int, controls: tuple[str, ...]) -> int:
    """`end`, moved to the start of a token that it would cut in one of the texts."""
    earliest = end
    for control in controls:
        reach = len(control) - 1
        low = max(end - reach, 0)
        for text in texts:
            at = text[low : end + reach].find(control)
            if at >= 0:
                earliest = min(earliest, low + at)
    return earliest


def _common_length(a: str, b: str) -> int:
    """The length of the common prefix, by halving: slices compare much faster than characters."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
