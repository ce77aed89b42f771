"""Spans of characters -> spans of tokens, such that the tokens before a target are those of its own prompt."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from tokenizers import AddedToken

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.render.sandbox import RenderError, RunawayError, Sandbox, written_literals
from apollo_sft.data.render.spans import Span, Text, UnprovableError
from apollo_sft.data.render.template import ChatTemplate, is_own, resolve_template
from apollo_sft.errors import DataError
from apollo_sft.types import Message

TAIL_CACHE = 4096
KEPT_CHARACTERS = 4_000_000
"""Pieces of text are kept with their tokens until they are this long together."""
CONTROL = re.compile(r"<[|\uff5c][^\s<>|\uff5c]+[|\uff5c]>|<(?:start|begin|end)_of_[a-z]+>|</?s>|<(?:bos|eos)>")
"""How control tokens are spelled: <|im_end|>, <\uff5cUser\uff5c>, <end_of_turn>, </s>, <eos>."""
PROBES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
    ({"role": "system", "content": "c"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
)


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """`ids`: int32 (tokens,). `ranges[i]`: tokens [first, end) of span i. `num_cuts`: spans that start at a cut."""

    ids: np.ndarray
    ranges: list[tuple[int, int]]
    num_cuts: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenised on its own. `ids`: int32 (tokens,)."""

    text: str
    ids: np.ndarray
    encoding: Any


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
                "the tokenizer is a slow one: it cannot say which characters a token covers",
                found=type(tokenizer).__name__,
                expected="a fast tokenizer (tokenizer.json)",
                fix="convert it with transformers and save it beside the model",
            )
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.splits_specials = bool(getattr(tokenizer, "split_special_tokens", False))
        self.added, self.edges = _edges(() if self.splits_specials else tokenizer.added_tokens_decoder.values())
        self.longest = max([1, *(len(token.content) for token in tokenizer.added_tokens_decoder.values())])
        self.pieces: dict[str, Piece] = {}
        self.checked = False
        self._tail_ids = lru_cache(TAIL_CACHE)(self._encode_tail)

    def encode(self, texts: Sequence[Text]) -> list[TokenSpans | UnprovableError]:
        """One result a text, in order: its tokens, or why a span has none."""
        self._prepare_backend()
        if sum(map(len, self.pieces)) > KEPT_CHARACTERS:
            self.pieces.clear()
        split: list[list[str]] = []
        missing: dict[str, None] = {}
        before: list[str] = []
        for text in texts:
            kept = self._kept(before, text.text)
            before = self._split(text.text, before[:kept])
            split.append(before)
            missing.update((part, None) for part in before[kept:] if part not in self.pieces)
        self.pieces.update(zip(missing, self._encode(list(missing)), strict=True))
        if not self.checked and texts:
            self._check(texts[:4], split[:4])
        return [self._try_map(text, parts) for text, parts in zip(texts, split, strict=True)]

    def _prepare_backend(self) -> None:
        """As transformers sets it for a plain call."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = self.splits_specials

    def _check(self, texts: Sequence[Text], split: Sequence[list[str]]) -> None:
        """The proof, once, that a plain call of the tokenizer gives the same ids."""
        theirs = self.tokenizer([text.text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        ours = [[int(token) for part in parts for token in self.pieces[part].ids] for parts in split]
        if theirs != ours:
            raise DataError(
                "the tokenizer does more than its tokenizer.json says, so targets cannot be located",
                found=type(self.tokenizer).__name__,
                expected="the same ids from the tokenizer and from its backend",
            )
        self.checked = True

    def _kept(self, before: Sequence[str], text: str) -> int:
        """How many of the pieces `before` of another text are the first pieces of `text` too.

        Where a text is cut is decided from left to right, each time by at most `longest` characters from the cut on.
        """
        common = 0
        for part in before:
            if not text.startswith(part, common):
                break
            common += len(part)
        return bisect_right([*accumulate(map(len, before))], common - self.longest)

    def _split(self, text: str, first: list[str]) -> list[str]:
        """The pieces of a text that begins with the pieces `first`."""
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
        """Cut at the starts where the prompt's tokens would be others, then the tokens of every span."""
        starts = [0, *accumulate(len(piece.text) for piece in pieces)]
        firsts = [self._first_token(span, pieces, starts) for span in text.spans]
        cuts = [span for span, first in zip(text.spans, firsts, strict=True) if first is None]
        if cuts:
            pieces = list(self._cut(pieces, starts, cuts))
            starts = [0, *accumulate(len(piece.text) for piece in pieces)]
            firsts = [self._first_token(span, pieces, starts) for span in text.spans]
        offsets = [0, *accumulate(len(piece.ids) for piece in pieces)]
        ranges = []
        for span, local in zip(text.spans, firsts, strict=True):
            if local is None:
                raise UnprovableError(span.turn, "a token straddles the start of the reply however the text is cut")
            first = offsets[_piece_at(starts, span.start)] + local
            last_at = _piece_at(starts, span.end - 1)
            end = first if span.start == span.end else offsets[last_at] + self._end_token(span, pieces, starts, last_at)
            ranges.append((first, end))
        ids = np.concatenate([piece.ids for piece in pieces]) if pieces else np.zeros(0, np.int32)
        return TokenSpans(ids, ranges, len(cuts))

    def _first_token(self, span: Span, pieces: Sequence[Piece], starts: Sequence[int]) -> int | None:
        """The first token of the target, counted in its piece; None where the prompt, alone, has other tokens.

        They could differ in the last piece of the prompt only, nearly always the same `<|im_start|>assistant\n`.
        """
        at = _piece_at(starts, span.start)
        local = span.start - starts[at]
        if local == 0:
            return 0
        first = _token_from(pieces[at].encoding, local)
        return first if self._tail_ids(pieces[at].text[:local]) == pieces[at].ids[:first].tolist() else None

    def _cut(self, pieces: Sequence[Piece], starts: Sequence[int], cuts: Sequence[Span]) -> Iterator[Piece]:
        """The pieces, those that hold a start of `cuts` cut there and each part tokenised alone.

        Raises: UnprovableError where the parts spell another text.
        """
        for piece, start in zip(pieces, starts, strict=False):
            inside = [span for span in cuts if start < span.start < start + len(piece.text)]
            edges = sorted({0, len(piece.text), *(span.start - start for span in inside)})
            parts = list(self._encode([piece.text[a:b] for a, b in pairwise(edges)])) if inside else [piece]
            if inside and self._decode(np.concatenate([part.ids for part in parts])) != self._decode(piece.ids):
                raise UnprovableError(
                    inside[0].turn,
                    "a token straddles the start of the reply, and the text cut there has tokens that spell another "
                    "text",
                )
            yield from parts

    def _decode(self, ids: np.ndarray) -> str:
        text: str = self.backend.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def _end_token(self, span: Span, pieces: Sequence[Piece], starts: Sequence[int], at: int) -> int:
        """The token behind the target, counted in the piece `at` in which it ends."""
        text, encoding, end = pieces[at].text, pieces[at].encoding, span.end - starts[at]
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


def _edges(added_tokens: Any) -> tuple[re.Pattern[str], frozenset[str]]:
    """Matches the added tokens that are taken out of a text first; and those before which it may be cut.

    Not where a token swallows the white space before it, or stands for whole words only.
    """
    first = [token for token in added_tokens if not token.normalized and token.content]
    longest_first = sorted((token.content for token in first), key=lambda content: -len(content))
    edges = frozenset(token.content for token in first if not token.lstrip and not token.single_word)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), edges


def _piece_at(starts: Sequence[int], character: int) -> int:
    """The piece that holds `character`; the number of pieces behind the end of the text."""
    return bisect_right(starts, max(character, 0)) - 1


def _token_from(encoding: Any, start: int) -> int:
    """The first token that covers or follows character `start`; the number of tokens when there is none."""
    token = encoding.char_to_token(start)
    if token is not None:
        return int(token)
    return next((i for i, (first, _) in enumerate(encoding.offsets) if first >= start), len(encoding.ids))


def control_tokens(tokenizer: Any, template: ChatTemplate) -> tuple[str, ...]:
    """The tokens that can end a turn, longest first: special tokens, and added ones that the template writes."""
    texts = template.text + template.text_for(True)
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content in texts:
            found.add(token.content)
    return tuple(sorted(found - {""}, key=lambda text: (-len(text), text)))


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches the special tokens that text can spell, longest first."""
    found = set(tokenizer.all_special_tokens)
    found |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if getattr(tokenizer, "split_special_tokens", False):
        found = set()
    longest_first = sorted(found - {""}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def fit_template(tokenizer: Any, data: DataConfig, add: bool) -> ChatTemplate:
    """The template that `data.chat_template` names, and a tokenizer that knows its control tokens.

    `add`: those that it does not know as one token are added to it, in place, as special tokens. Without, a template
    that is not the tokenizer's own must write none; its own may, as some models were trained so.
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
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in unknown], special_tokens=True)
    return template


def unknown_tokens(tokenizer: Any, template: ChatTemplate, data: DataConfig) -> list[str]:
    """The control tokens that a template writes, and that are no added tokens, in the order in which it writes them.

    They are found in its own text, and in renderings of short conversations: some are put together.
    Raises: DataError for a template that does not compile.
    """
    sandbox = Sandbox(template, dict(tokenizer.special_tokens_map) | dict(data.apply_chat_template_kwargs))
    texts = [literal for tools in (False, True) for literal in written_literals(template.text_for(tools))]
    with sandbox.bounded():
        for probe in PROBES:
            with suppress(RenderError, RunawayError):
                texts.append(sandbox.render(probe, None, {}, add_generation_prompt=True))
    found = dict.fromkeys(token for text in texts for token in CONTROL.findall(text))
    known = tokenizer.get_added_vocab()
    return [token for token in found if token not in known]
