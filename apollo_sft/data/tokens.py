"""Spans of characters -> spans of tokens, such that the tokens before a target are those of its own prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from apollo_sft.data.spans import Span, UnprovableError
from apollo_sft.errors import DataError

TAIL_CACHE = 4096


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """`ids`: int32 (tokens,). `ranges[i]`: tokens [first, end) of span i. `num_cuts`: spans that start at a cut."""

    ids: np.ndarray
    ranges: list[tuple[int, int]]
    num_cuts: int


@dataclass(frozen=True, slots=True)
class Text:
    """One whole rendering and the spans of its targets, in order."""

    text: str
    spans: Sequence[Span]


class Encoder:
    """Tokenises whole renderings in batches, without adding special tokens.

    Raises: DataError for a tokenizer without a Rust backend, which knows no character offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer is a slow one: it cannot say which characters a token covers",
                found=type(tokenizer).__name__,
                expected="a fast tokenizer (tokenizer.json)",
                fix="convert it with transformers and save it beside the model",
            )
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.added_ids = frozenset(tokenizer.added_tokens_decoder)
        self.checked = False
        self._tail_ids = lru_cache(TAIL_CACHE)(self._encode_tail)

    def encode(self, texts: Sequence[Text]) -> list[TokenSpans | UnprovableError]:
        """One result a text, in order: its tokens, or why a span has none."""
        self._prepare_backend([text.text for text in texts[:4]])
        encodings = self.backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        return [self._try_map(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _prepare_backend(self, texts: list[str]) -> None:
        """As transformers sets it for a plain call; and, once, the proof that both give the same ids."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
        if self.checked or not texts:
            return
        theirs = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ours = [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]
        if theirs != ours:
            raise DataError(
                "the tokenizer does more than its tokenizer.json says, so targets cannot be located",
                found=type(self.tokenizer).__name__,
                expected="the same ids from the tokenizer and from its backend",
            )
        self.checked = True

    def _try_map(self, text: Text, encoding: Any) -> TokenSpans | UnprovableError:
        try:
            return self._map(text, encoding)
        except UnprovableError as error:
            return error

    def _map(self, text: Text, encoding: Any) -> TokenSpans:
        ids = encoding.ids
        firsts = [self._first_token(text.text, span.start, encoding, ids) for span in text.spans]
        cuts = [span.start for span, first in zip(text.spans, firsts, strict=True) if first is None]
        if cuts:
            return self._map_cut(text, ids, cuts)
        ranges = [
            (first, self._end_token(text.text, span, encoding, 0, first))
            for span, first in zip(text.spans, firsts, strict=True)
            if first is not None
        ]
        return TokenSpans(np.asarray(ids, dtype=np.int32), ranges, 0)

    def _first_token(self, text: str, start: int, encoding: Any, ids: list[int]) -> int | None:
        """The token at which a target starts; None when the prompt before it, alone, has other tokens.

        Added tokens are split off before anything else, so only the stretch since the last one has to be compared,
        and that is nearly always the same few characters (`<|im_start|>assistant\\n`).
        """
        first = _token_from(encoding, start)
        if first == 0:
            return 0 if start == 0 else None
        tail = first - 1
        while tail > 0 and ids[tail] not in self.added_ids:
            tail -= 1
        tail_start = 0 if tail == 0 else encoding.token_to_chars(tail)[0]
        return first if self._tail_ids(text[tail_start:start]) == ids[tail:first] else None

    def _encode_tail(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _map_cut(self, text: Text, whole_ids: list[int], cuts: list[int]) -> TokenSpans:
        """The text cut at the starts where the prompt's tokens would change, each piece tokenised alone."""
        edges = sorted({0, *cuts, len(text.text)})
        pieces = [text.text[a:b] for a, b in pairwise(edges)]
        encodings = self.backend.encode_batch(pieces, add_special_tokens=False)
        offsets = np.cumsum([0, *(len(e.ids) for e in encodings)])
        ids = [token for e in encodings for token in e.ids]
        if self._decode(ids) != self._decode(whole_ids):
            turn = next(span.turn for span in text.spans if span.start == cuts[0])
            raise UnprovableError(
                turn,
                "a token straddles the start of the reply, and the text cut there has tokens that spell another text",
            )
        ranges = []
        for span in text.spans:
            piece = int(np.searchsorted(edges, span.start, side="right")) - 1
            encoding, base, local = encodings[piece], int(offsets[piece]), span.start - edges[piece]
            first = 0 if local == 0 else self._first_token(pieces[piece], local, encoding, encoding.ids)
            if first is None:
                raise UnprovableError(span.turn, "a token straddles the start of the reply however the text is cut")
            end = self._end_token(pieces[piece], span, encoding, edges[piece], first)
            ranges.append((base + first, base + end))
        return TokenSpans(np.asarray(ids, dtype=np.int32), ranges, len(cuts))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text

    def _end_token(self, text: str, span: Span, encoding: Any, offset: int, first: int) -> int:
        """The token behind the span. `text` is a piece of the whole that starts at its character `offset`."""
        if span.start == span.end:
            return first
        end = span.end - offset
        last = encoding.char_to_token(end - 1)
        if last is None:
            last = max(_token_from(encoding, end) - 1, 0)
        while last + 1 < len(encoding.ids) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1
        if span.stop is not None and encoding.ids[last] != self.backend.token_to_id(span.stop):
            raise UnprovableError(span.turn, f"the stop {span.stop!r} is not one token here")
        if text[end : encoding.token_to_chars(last)[1]].strip():
            raise UnprovableError(span.turn, "a token straddles the end of the reply")
        return int(last) + 1


def _token_from(encoding: Any, start: int) -> int:
    """The first token that covers or follows character `start`; the number of tokens when there is none."""
    token = encoding.char_to_token(start)
    if token is not None:
        return int(token)
    return next((i for i, (first, _) in enumerate(encoding.offsets) if first >= start), len(encoding.ids))
