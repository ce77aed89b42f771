r"""Find the targets in rendered text. A target that cannot be proven from renderings is refused.

A chatml turn. The conversation is a user's "1 + 1?" and the assistant's "2". Two renderings are compared:

    prompt (first message, add_generation_prompt)  <|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n
    text (both messages)                           <|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n
                                                   2<|im_end|>\n

The text starts with the prompt, so the target starts behind it. Without white space the text ends with the control
token `<|im_end|>`, which is the stop. The target is `2<|im_end|>`: what the model has to write at inference.

A Qwen3 turn with thinking. The messages are "a", "b" (reasoning "hm"), "c", "d". Qwen3 writes the reasoning of a reply
only as long as no user message follows:

    through "b"   … <|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n
    through "d"   … <|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n
                  <|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n

At inference the model writes "b" with its reasoning, and later sees it without. The second text does not start with the
first, so no single text holds both targets. With data.history=expand the row gives two texts: the first with the target
`<think>\nhm\n</think>\n\nb<|im_end|>`, the second with the target of "d" only. With last_turn it gives the second text,
with as_rendered the second text too, with "b" trained as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from apollo_sft.data.render.renderings import Renderings, Turn, UnprovableError
from apollo_sft.data.render.reply_format import MARK, ReplyFormat
from apollo_sft.data.render.text_search import common_length, first_token
from apollo_sft.data.render.turns import find_turn

History = Literal["expand", "last_turn", "as_rendered"]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a rendering: what the model writes in message `turn`, through its stop token."""

    turn: int
    start: int
    end: int

    reply_start: int
    """The character at which the reply starts, with what the generation prompt opens for it (`<think>`). It is before
    `start` where a part of the reply is context."""

    stop: str | None
    """The text of the stop token, None where the template writes none."""

    second_stop: bool = False
    """The span ends with a second end mark, the tokenizer's eos."""

    lacks_prefill: bool = False
    """The generation prompt continues behind `start` with a prefill (`<think>\\n`) that the reply does not continue."""

    rewritten: bool = False
    """The span is not what the model writes at inference, but what the template makes of it when messages follow."""

    has_header: bool = False
    """The span begins with a role header, as the template has no generation prompt: see `ReplyFormat.header`."""

    clipped: bool = False
    """The template's generation tags mark more than the model writes."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text that is trained, and the spans of its targets, in order."""

    text: str
    spans: Sequence[Span]

    num_messages: int
    """The messages of the row that it goes through."""

    arguments: dict[str, Any]
    """The template arguments of the row with which it was rendered."""

    joined_at: int | None = None
    """The character from which on it is the end of the rendering of `num_messages` messages; before it is a prompt.
    None where all of it is that rendering."""


def lay_out(
    renderings_of: Callable[[int | None], Renderings],
    trained: Sequence[int],
    history: History,
    answers_only: bool = False,
) -> list[Text]:
    """Return the fewest texts that contain each trained turn as at inference, with its span in one of them.

    A text contains a turn when it starts with what the model sees and writes in it. A template that rewrites earlier
    turns once others follow needs several texts, each of which ends with one of the turns.
    `renderings_of`: the renderings with the template arguments of a message, or of the row (None).
    `answers_only`: the reasoning of a reply is context.

    Raises: UnprovableError, RenderError.
    """
    remaining = [find_turn(renderings_of(index), index, answers_only) for index in trained]
    if not remaining:
        return [_whole(renderings_of(None), [])]
    if history == "as_rendered":
        return [_as_rendered(remaining)]

    texts: list[Text] = []
    while remaining:
        # From the last turn backwards: a text that ends with a turn contains the most of the earlier ones.
        last = remaining[-1]
        contained = _contained(last.text, remaining)
        text = _ending_with(last, contained)
        if not texts and last.num_messages < len(last.renderings.messages):
            # The whole conversation, if it contains no turn less: then what follows the last trained turn is read too.
            whole = last.renderings.text(len(last.renderings.messages))
            in_whole = _contained(whole, remaining)
            if set(contained) <= set(in_whole):
                text = _whole(last.renderings, in_whole)
                contained = in_whole

        texts.append(text)
        remaining = [turn for turn in remaining if turn not in contained]
        if history != "expand":
            break
    return texts[::-1]


def within_generation_tags(text: Text, marked: Sequence[tuple[int, int]], reply_format: ReplyFormat) -> Text:
    """Return the text with the targets reduced to the ranges that the template's generation tags mark.

    Tags often mark the role header too, which no model writes: of a range only what is in a target counts.
    """
    spans: list[Span] = []
    for span in text.spans:
        for first, last in marked:
            if first < span.end and last > span.start:
                _add_part(spans, span, (first, last), text.text, reply_format)
    return replace(text, spans=spans)


def _add_part(spans: list[Span], span: Span, marked: tuple[int, int], text: str, reply_format: ReplyFormat) -> None:
    """Append the part of `span` that is in the range `marked`, joined with the part before it where they touch."""
    first, last = marked
    outside = text[first : span.start] + text[span.end : last]
    start = max(first, span.start)
    end = min(last, span.end)
    if spans and (spans[-1].turn, spans[-1].end) == (span.turn, start):
        start = spans.pop().start

    part = replace(span, start=start, end=end, clipped=bool(outside.strip()))
    if end < span.end:
        part = replace(part, stop=reply_format.stop_token(text[start:end]), second_stop=False)
    spans.append(part)


def _contained(text: str, turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if text.startswith(turn.text)]


def _ending_with(last: Turn, turns: Sequence[Turn]) -> Text:
    """Return the text that ends with a turn, and contains these."""
    text = last.text + last.rest
    spans = [_span(turn, text, last.num_messages) for turn in turns]
    joined_at = None
    if text != last.renderings.text(last.num_messages):
        joined_at = last.start
    return Text(text, spans, last.num_messages, last.renderings.arguments, joined_at)


def _whole(renderings: Renderings, turns: Sequence[Turn]) -> Text:
    """Return the text of the whole conversation, which contains these turns."""
    num_messages = len(renderings.messages)
    text = renderings.text(num_messages)
    spans = [_span(turn, text, num_messages) for turn in turns]
    return Text(text, spans, num_messages, renderings.arguments)


def _as_rendered(turns: Sequence[Turn]) -> Text:
    """Return the text of the whole conversation, with each turn as the template writes it there."""
    renderings = turns[-1].renderings
    num_messages = len(renderings.messages)
    whole = renderings.text(num_messages)
    spans = []
    for turn in turns:
        if whole.startswith(turn.text):
            spans.append(_span(turn, whole, num_messages))
        else:
            spans.append(_rewritten_span(renderings, turn, whole))
    return Text(whole, spans, num_messages, renderings.arguments)


def _rewritten_span(renderings: Renderings, turn: Turn, whole: str) -> Span:
    """Find a turn in the whole text by its content: from the role header before it to the stop behind it.

    Raises: UnprovableError.
    """
    from apollo_sft.data.render.joined import content_end, find_header

    # The content lies where another content changes the text: between the common prefix and the common suffix.
    message = renderings.messages[turn.index]
    marked = renderings.changed(turn.index, message | {"content": MARK}, len(renderings.messages))
    first = common_length(whole, marked)
    last = len(whole) - min(common_length(whole[::-1], marked[::-1]), len(whole) - first)

    header = renderings.format.usual_prompt(renderings.arguments)
    earliest = content_end(renderings, turn.index - 1, whole, len(renderings.messages))
    start, length = find_header(header, whole, earliest, first)
    end = whole.find(turn.stop or MARK, last)
    if turn.stop is None or (header.strip() and not header[:length].strip()) or end < 0:
        raise UnprovableError(
            turn.index, "the template rewrites the turn once others follow, and marks its end otherwise"
        )
    end += len(turn.stop)
    return Span(turn.index, start, end, start, turn.stop, lacks_prefill=turn.lacks_prefill, rewritten=True)


def _span(turn: Turn, text: str, num_messages: int) -> Span:
    """Return the span of a turn in a text that contains it.

    It ends behind the stop token, behind a second end mark (eos at the end of the text), or, where replies have no
    stop of their own, behind the control token with which the next message starts.
    """
    reply_format = turn.renderings.format
    start = turn.target_start
    end = len(turn.text)
    reply_start = turn.start
    generation_prompt = reply_format.usual_prompt(turn.renderings.arguments)
    if text.endswith(generation_prompt, 0, turn.start):
        reply_start -= len(generation_prompt)

    header = reply_format.header
    span = Span(turn.index, start, end, reply_start, turn.stop, lacks_prefill=turn.lacks_prefill)
    if header and text[start:end].lstrip().startswith(header):
        span = replace(span, has_header=True)
    is_last = turn.index + 1 == num_messages
    if reply_format.has_stop and not is_last:
        return span

    following = text[end:].lstrip()
    next_token = first_token(following, reply_format.control_tokens)
    ends_with_eos = False
    if turn.stop is not None and is_last and reply_format.document_end == reply_format.eos != turn.stop:
        ends_with_eos = reply_format.eos is not None and following.rstrip() == reply_format.eos
    if not ends_with_eos and (reply_format.has_stop or next_token is None):
        return span

    stop = next_token or turn.stop
    end = len(text) - len(following) + len(stop or "")
    return replace(span, end=end, stop=stop, second_stop=ends_with_eos)
