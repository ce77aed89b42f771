"""Where the targets are in the rendered text. What cannot be proven from renderings is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apollo_sft.types import Message

Render = Callable[[int, bool], str]
"""(number of messages, add_generation_prompt) -> text, always with the same template arguments."""


class UnprovableError(Exception):
    """A turn whose target cannot be found for certain. `turn` is the index of its message."""

    def __init__(self, turn: int, reason: str) -> None:
        super().__init__(reason)
        self.turn = turn


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of the whole rendering: what the model says in message `turn`, through its stop token.

    `stop` is the text of the stop token, None where the template writes none.
    """

    turn: int
    start: int
    end: int
    stop: str | None


def find_spans(messages: Sequence[Message], render: Render, stops: tuple[str, ...]) -> tuple[str, list[Span]]:
    """The whole rendering and the span of every turn of the assistant.

    A span starts where the generation prompt of its turn ends. The turn rendered as the last one must be what the
    whole rendering holds: else the template rewrites history, and the model would say something else at inference.
    `stops` are the texts of the tokens that can end a turn, longest first.

    Raises: UnprovableError.
    """
    whole = render(len(messages), False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(turn, True)
        if not whole.startswith(prompt):
            raise UnprovableError(
                turn, "this template rewrites history: the prompt of the turn is not in the whole text"
            )
        if turn + 1 < len(messages):
            end = _end_of_earlier_turn(whole, render(turn + 1, False), turn, stops)
        else:
            end = _end_of_last_turn(whole, len(prompt), render, len(messages), stops)
        spans.append(_through_stop(whole, turn, len(prompt), end, stops))
    _check_stops(whole, spans, stops)
    return whole, spans


def _end_of_earlier_turn(whole: str, alone: str, turn: int, stops: tuple[str, ...]) -> int:
    """Where `alone`, the rendering that ends with the turn, stops agreeing with `whole`.

    It may differ only by marks that close the whole text (Phi-3 ends it with `<|endoftext|>`).
    """
    if whole.startswith(alone):
        return len(alone)
    end = _not_inside_a_token((whole, alone), _common_length(whole, alone), stops)
    if not _only_marks(alone[end:], stops):
        raise UnprovableError(
            turn, "this template rewrites history: the turn is written differently once others follow"
        )
    return end


def _end_of_last_turn(whole: str, start: int, render: Render, num_messages: int, stops: tuple[str, ...]) -> int:
    """The end of `whole`, without a mark that closes the text rather than the turn.

    Such a mark stands behind the stop token and is missing when the text goes on with a generation prompt.
    """
    text = whole[start:].rstrip()
    last = _token_at_end(text, stops)
    if last is None or _token_at_end(text[: -len(last)].rstrip(), stops) is None:
        return len(whole)
    going_on = render(num_messages, True)
    if going_on.startswith(whole):
        return len(whole)
    end = _not_inside_a_token((whole, going_on), _common_length(whole, going_on), stops)
    return end if end > start and _only_marks(whole[end:], stops) else len(whole)


def _through_stop(whole: str, turn: int, start: int, end: int, stops: tuple[str, ...]) -> Span:
    """The span without white space after the stop token; without a stop token all of it but white space."""
    if end < start:
        raise UnprovableError(turn, "this template rewrites history: the turn ends inside its own prompt")
    text = whole[start:end].rstrip()
    return Span(turn, start, start + len(text), _token_at_end(text, stops))


def _check_stops(whole: str, spans: list[Span], stops: tuple[str, ...]) -> None:
    """A turn without a stop token is accepted only where the template writes none at all."""
    stopped = any(span.stop is not None for span in spans)
    for span in spans:
        if span.stop is not None:
            continue
        if stopped:
            raise UnprovableError(span.turn, "the turn has no stop token, although other turns have one")
        if whole[span.end :].lstrip().startswith(stops):
            raise UnprovableError(
                span.turn, "the stop token of the turn is the start of the next message, which is not built yet"
            )


def _token_at_end(text: str, stops: tuple[str, ...]) -> str | None:
    if not text.endswith(stops):
        return None
    return next(stop for stop in stops if text.endswith(stop))


def _only_marks(text: str, stops: tuple[str, ...]) -> bool:
    text = text.strip()
    while text:
        last = _token_at_end(text, stops)
        if last is None:
            return False
        text = text[: -len(last)].rstrip()
    return True


def _not_inside_a_token(texts: tuple[str, str], end: int, stops: tuple[str, ...]) -> int:
    """`end`, moved to the start of a token that it would cut in one of the texts."""
    earliest = end
    for stop in stops:
        reach = len(stop) - 1
        low = max(end - reach, 0)
        for text in texts:
            at = text[low : end + reach].find(stop)
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
