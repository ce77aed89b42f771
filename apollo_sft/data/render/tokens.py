"""Turn spans of characters into spans of tokens, so that the tokens before a target are those of its own prompt."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from tokenizers import AddedToken

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.render.control_tokens import unknown_tokens
from apollo_sft.data.render.renderings import UnprovableError
from apollo_sft.data.render.spans import Span, Text
from apollo_sft.data.render.template import ChatTemplate, is_own, resolve_template
from apollo_sft.errors import DataError

CACHED_TAILS = 4096
MAX_CACHED_CHARACTERS = 4_000_000
"""Pieces of text are kept with their tokens until they are this long together."""

CHECKED_TEXTS = 4


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """The tokens of one text."""

    ids: np.ndarray
    """int32 of shape (tokens,)."""

    ranges: list[tuple[int, int]]
    """Tokens [first, end) of each span."""

    num_cuts: int
    """Spans at whose start the text was cut, because a token covered the start."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenised on its own."""

    text: str

    ids: np.ndarray
    """int32 of shape (tokens,)."""

    encoding: Any
    """The encoding of the Rust backend, which knows the characters of each token."""


class Encoder:
    """Tokenises renderings in batches, without adding special tokens.

    A tokenizer takes its added tokens out of a text before anything else, so the stretches between them are
    tokenised on their own. A text is therefore cut in front of added tokens, and a piece that was there before (a
    system prompt with its tools, the earlier turns of a row of several samples) is not tokenised again.

    Raises: DataError for a tokenizer without a Rust backend, which knows no character offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer is a slow one: it does not know which characters a token covers",
                found=type(tokenizer).__name__,
                expected="a fast tokenizer (tokenizer.json)",
                fix="convert it with transformers and save it beside the model",
            )
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.splits_specials = bool(getattr(tokenizer, "split_special_tokens", False))
        added = list(tokenizer.added_tokens_decoder.values())
        self.added, self.edges = _added_and_edges([] if self.splits_specials else added)
        self.longest = max([1, *(len(token.content) for token in added)])
        self.pieces: dict[str, Piece] = {}
        self.checked = False
        self._tail_ids = lru_cache(CACHED_TAILS)(self._encode_tail)

    def encode(self, texts: Sequence[Text]) -> list[TokenSpans | UnprovableError]:
        """Return one result for each text, in order: its tokens, or why a span has none."""
        self._prepare_backend()
        if sum(map(len, self.pieces)) > MAX_CACHED_CHARACTERS:
            self.pieces.clear()

        split: list[list[str]] = []
        missing: dict[str, None] = {}
        parts: list[str] = []
        for text in texts:
            # Neighbouring texts often begin alike, so the cuts of the one before are taken over as far as they fit.
            shared = self._num_shared(parts, text.text)
            parts = self._split(text.text, parts[:shared])
            split.append(parts)
            for part in parts[shared:]:
                if part not in self.pieces:
                    missing[part] = None
        self.pieces.update(zip(missing, self._encode(list(missing)), strict=True))

        if not self.checked and texts:
            self._check(texts[:CHECKED_TEXTS], split[:CHECKED_TEXTS])
        return [self._try_map(text, parts) for text, parts in zip(texts, split, strict=True)]

    def _prepare_backend(self) -> None:
        """Set what transformers sets for a plain call. Another caller may have changed it."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = self.splits_specials

    def _check(self, texts: Sequence[Text], split: Sequence[list[str]]) -> None:
        """Check, once, that a plain call of the tokenizer gives the same ids."""
        theirs = self.tokenizer([text.text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        ours = []
        for parts in split:
            ids: list[int] = []
            for part in parts:
                ids += self.pieces[part].ids.tolist()
            ours.append(ids)

        if theirs != ours:
            raise DataError(
                "the tokenizer gives other tokens than its tokenizer.json, so targets cannot be located",
                found=type(self.tokenizer).__name__,
                expected="the same ids from the tokenizer and from its backend",
            )
        self.checked = True

    def _num_shared(self, parts: Sequence[str], text: str) -> int:
        """Return how many of the pieces `parts` of another text are the first pieces of `text` too.

        Where a text is cut is decided from left to right, each time by at most `longest` characters from the cut on.
        """
        common = 0
        for part in parts:
            if not text.startswith(part, common):
                break
            common += len(part)
        return bisect_right([*accumulate(map(len, parts))], common - self.longest)

    def _split(self, text: str, first: list[str]) -> list[str]:
        """Return the pieces of a text that begins with the pieces `first`."""
        start = sum(map(len, first))
        cuts = [match.start() for match in self.added.finditer(text, start) if match.group() in self.edges]
        return first + [text[a:b] for a, b in pairwise([start, *cuts, len(text)]) if a < b]

    def _encode(self, parts: list[str]) -> Iterator[Piece]:
        encodings = self.backend.encode_batch(parts, add_special_tokens=False)
        for part, encoding in zip(parts, encodings, strict=True):
            yield Piece(part, np.array(encoding.ids, dtype=np.int32), encoding)

    def _encode_tail(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _try_map(self, text: Text, parts: Sequence[str]) -> TokenSpans | UnprovableError:
        try:
            return self._map(text, [self.pieces[part] for part in parts])
        except UnprovableError as error:
            return error

    def _map(self, text: Text, pieces: list[Piece]) -> TokenSpans:
        """Cut at the starts where the prompt would have other tokens, then find the tokens of every span."""
        starts = _starts(pieces)
        firsts = [self._first_token(span, pieces, starts) for span in text.spans]
        cuts = [span for span, first in zip(text.spans, firsts, strict=True) if first is None]
        if cuts:
            pieces = list(self._cut(pieces, starts, cuts))
            starts = _starts(pieces)
            firsts = [self._first_token(span, pieces, starts) for span in text.spans]

        offsets = [0, *accumulate(len(piece.ids) for piece in pieces)]
        ranges = []
        for span, local in zip(text.spans, firsts, strict=True):
            if local is None:
                raise UnprovableError(span.turn, "a token straddles the start of the reply however the text is cut")
            first = offsets[_piece_at(starts, span.start)] + local
            end = first
            if span.start < span.end:  # an empty reply has no token in which it could end
                last_at = _piece_at(starts, span.end - 1)
                end = offsets[last_at] + self._end_token(span, pieces[last_at], span.end - starts[last_at])
            ranges.append((first, end))

        ids = np.concatenate([piece.ids for piece in pieces]) if pieces else np.zeros(0, np.int32)
        return TokenSpans(ids, ranges, len(cuts))

    def _first_token(self, span: Span, pieces: Sequence[Piece], starts: Sequence[int]) -> int | None:
        """Return the first token of the target, counted in its piece; None where the prompt, alone, has other tokens.

        They could differ in the last piece of the prompt only, nearly always the same `<|im_start|>assistant\n`.
        """
        at = _piece_at(starts, span.start)
        local = span.start - starts[at]
        if local == 0:
            return 0

        piece = pieces[at]
        first = _token_from(piece.encoding, local)
        if self._tail_ids(piece.text[:local]) != piece.ids[:first].tolist():
            return None
        return first

    def _cut(self, pieces: Sequence[Piece], starts: Sequence[int], cuts: Sequence[Span]) -> Iterator[Piece]:
        """Yield the pieces, those that hold a start of `cuts` cut there, each part tokenised alone.

        Raises: UnprovableError where the parts spell another text.
        """
        for piece, start in zip(pieces, starts, strict=False):
            inside = [span for span in cuts if start < span.start < start + len(piece.text)]
            if not inside:
                yield piece
                continue

            edges = sorted({0, len(piece.text), *(span.start - start for span in inside)})
            parts = list(self._encode([piece.text[a:b] for a, b in pairwise(edges)]))
            # Some tokenizers put a space before a text, or treat its first token in another way.
            if self._decode(np.concatenate([part.ids for part in parts])) != self._decode(piece.ids):
                raise UnprovableError(
                    inside[0].turn,
                    "a token straddles the start of the reply, and the text cut there has tokens that spell another "
                    "text",
                )
            yield from parts

    def _decode(self, ids: np.ndarray) -> str:
        text: str = self.backend.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def _end_token(self, span: Span, piece: Piece, end: int) -> int:
        """Return the token behind the target, counted in the piece in which it ends, before character `end`."""
        encoding = piece.encoding
        last = encoding.char_to_token(end - 1)
        if last is None:  # the tokenizer dropped this character
            last = max(_token_from(encoding, end) - 1, 0)
        # A character of several bytes may have several tokens, and `char_to_token` gives the first of them.
        while last + 1 < len(encoding.ids) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1

        if span.stop is not None and encoding.ids[last] != self.backend.token_to_id(span.stop):
            raise UnprovableError(span.turn, f"the stop {span.stop!r} is not one token here")
        if piece.text[end : encoding.token_to_chars(last)[1]].strip():
            raise UnprovableError(span.turn, "a token straddles the end of the reply")
        return int(last) + 1


def _added_and_edges(added_tokens: Iterable[Any]) -> tuple[re.Pattern[str], frozenset[str]]:
    """Return a pattern of the added tokens that are taken out of a text first, and those before which it may be cut.

    Not where a token swallows the white space before it, or matches whole words only.
    """
    first = [token for token in added_tokens if not token.normalized and token.content]
    longest_first = sorted((token.content for token in first), key=lambda content: -len(content))
    edges = frozenset(token.content for token in first if not token.lstrip and not token.single_word)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), edges


def _starts(pieces: Sequence[Piece]) -> list[int]:
    """Return the character at which each piece starts, and the length of the text."""
    return [0, *accumulate(len(piece.text) for piece in pieces)]


def _piece_at(starts: Sequence[int], character: int) -> int:
    """Return the piece that holds `character`; the number of pieces behind the end of the text."""
    return bisect_right(starts, max(character, 0)) - 1


def _token_from(encoding: Any, start: int) -> int:
    """Return the first token that covers or follows character `start`; the number of tokens when there is none."""
    token = encoding.char_to_token(start)
    if token is not None:
        return int(token)
    return next((i for i, (first, _) in enumerate(encoding.offsets) if first >= start), len(encoding.ids))


def fit_template(tokenizer: Any, data: DataConfig, add: bool) -> ChatTemplate:
    """Return the template that `data.chat_template` names, for a tokenizer that knows its control tokens.

    `add`: those that it does not know as one token are added to it, in place, as special tokens. Without `add`, a
    template that is not the tokenizer's own must write none; its own may, as some models were trained so.
    Raises: DataError naming them.
    """
    template = resolve_template(tokenizer, data)
    if not add and is_own(tokenizer, template):
        return template

    unknown = unknown_tokens(tokenizer, template, data)
    if unknown and not add:
        raise DataError(
            f"the chat template ({template.source}) writes tokens that the tokenizer does not know as one token",
            found=f"no token {', '.join(unknown)}",
            expected="a tokenizer that has them",
            fix="model.add_special_tokens=true, which adds them and trains embeddings for them; "
            "or data.chat_template=plain, which ends answers with the tokenizer's own end token",
        )

    # Not normalized: such tokens are taken out of a text before anything else, see `Encoder`.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in unknown], special_tokens=True)
    return template
