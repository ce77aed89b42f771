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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from apollo_sft.data.render.reply_format import MARK, ReplyFormat
from apollo_sft.data.render.text_search import common_length, first_token
from apollo_sft.data.render.turns import Renderings, Turn, UnprovableError, find_turn

History = Literal["expand", "last_turn", "as_rendered"]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a rendering: what the model writes in message `turn`, through its stop token."""

    turn: int
    start: int
    end: int

    stop: str | None
    """The text of the stop token, None where the template writes none."""

    second_stop: bool = False
    """The span ends with a second end mark, the tokenizer's eos."""

    lacks_prefill: bool = False
    """The generation prompt continues behind `start` with a prefill (`<think>\\n`) that the template writes in no
    reply."""

    rewritten: bool = False
    """The span is not what the model writes at inference, but what the template makes of it when messages follow."""


@dataclass(frozen=True, slots=True)
class Text:
    """One rendering of the first `num_messages` messages, and the spans of its targets, in order."""

    text: str
    spans: Sequence[Span]
    num_messages: int


def lay_out(renderings: Renderings, trained: Sequence[int], history: History) -> list[Text]:
    """Return the fewest texts that contain each trained turn as at inference, with its span in one of them.

    A text contains a turn when it starts with what the model sees and writes in it. A template that rewrites earlier
    turns once others follow needs several texts, each of which ends with one of the turns.

    Raises: UnprovableError, RenderError.
    """
    num_messages = len(renderings.messages)
    remaining = [find_turn(renderings, index) for index in trained]
    if history == "as_rendered":
        return [_as_rendered(renderings, remaining)]

    texts: list[Text] = []
    while remaining or not texts:
        # From the last turn backwards: a text that ends with a turn contains the most of the earlier ones.
        end = remaining[-1].index + 1 if remaining else num_messages
        contained = _contained(renderings.text(end), remaining)
        if not texts and end < num_messages:
            # The whole conversation, if it contains no turn less: then what follows the last trained turn is read too.
            in_whole = _contained(renderings.text(num_messages), remaining)
            if set(contained) <= set(in_whole):
                end = num_messages
                contained = in_whole

        texts.append(_with_spans(renderings, end, contained))
        remaining = [turn for turn in remaining if turn not in contained]
        if history != "expand":
            break
    return texts[::-1]


def within_generation_tags(text: Text, marked: Sequence[tuple[int, int]], reply_format: ReplyFormat) -> Text:
    """Return the text with the targets reduced to the ranges that the template's generation tags mark.

    Raises: UnprovableError where the tags mark more than the model writes, but for white space around it.
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
    if outside.strip():
        raise UnprovableError(span.turn, f"the template's generation tags mark what no model writes: {outside!r}")

    start = max(first, span.start)
    end = min(last, span.end)
    if spans and (spans[-1].turn, spans[-1].end) == (span.turn, start):
        start = spans.pop().start

    if end == span.end:
        part = replace(span, start=start)
    else:
        stop = reply_format.stop_token(text[start:end])
        part = replace(span, start=start, end=end, stop=stop, second_stop=False)
    spans.append(part)


def _contained(text: str, turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if text.startswith(turn.text)]


def _with_spans(renderings: Renderings, num_messages: int, turns: Sequence[Turn]) -> Text:
    text = renderings.text(num_messages)
    spans = [_span(turn, text, num_messages, renderings.format) for turn in turns]
    return Text(text, spans, num_messages)


def _as_rendered(renderings: Renderings, turns: Sequence[Turn]) -> Text:
    """Return the text of the whole conversation, with each turn as the template writes it there."""
    num_messages = len(renderings.messages)
    whole = renderings.text(num_messages)
    spans = []
    for turn in turns:
        if whole.startswith(turn.text):
            spans.append(_span(turn, whole, num_messages, renderings.format))
        else:
            spans.append(_rewritten_span(renderings, turn, whole))
    return Text(whole, spans, num_messages)


def _rewritten_span(renderings: Renderings, turn: Turn, whole: str) -> Span:
    """Find a turn in the whole text by its content: from the role header before it to the stop behind it.

    Raises: UnprovableError.
    """
    # The content lies where another content changes the text: between the common prefix and the common suffix.
    marked = renderings.marked(turn.index, MARK, len(renderings.messages))
    first = common_length(whole, marked)
    last = len(whole) - min(common_length(whole[::-1], marked[::-1]), len(whole) - first)

    earlier = common_length(renderings.text(turn.index), turn.text)
    header = turn.text[earlier : turn.start]
    start = whole.rfind(header, 0, first) + len(header)
    end = whole.find(turn.stop or MARK, last)
    if turn.stop is None or start < len(header) or end < 0:
        raise UnprovableError(
            turn.index, "the template rewrites the turn once others follow, and marks its end otherwise"
        )
    return Span(turn.index, start, end + len(turn.stop), turn.stop, lacks_prefill=turn.lacks_prefill, rewritten=True)


def _span(turn: Turn, text: str, num_messages: int, reply_format: ReplyFormat) -> Span:
    """Return the span of a turn in a text that contains it.

    It ends behind the stop token, behind a second end mark (eos at the end of the text), or, where replies have no
    stop of their own, behind the control token with which the next message starts.
    """
    end = len(turn.text)
    is_last = turn.index + 1 == num_messages
    if reply_format.has_stop and not is_last:
        return Span(turn.index, turn.start, end, turn.stop, lacks_prefill=turn.lacks_prefill)

    stop = turn.stop
    following = text[end:].lstrip()
    ends_with_eos = False
    if stop is not None and is_last and reply_format.document_end == reply_format.eos != stop:
        ends_with_eos = reply_format.eos is not None and following.rstrip() == reply_format.eos

    next_token = first_token(following, reply_format.control_tokens)
    if ends_with_eos or (not reply_format.has_stop and next_token is not None):
        stop = next_token or stop
        end = len(text) - len(following) + len(stop or "")
    return Span(turn.index, turn.start, end, stop, ends_with_eos, turn.lacks_prefill)
