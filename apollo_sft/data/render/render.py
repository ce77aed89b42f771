r"""Render a Conversation into Samples: text, spans of targets, tokens once, and the one shift.

One row of chatml, through all steps:

    conversation   user "1 + 1?", assistant "2"
    text           <|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n
    span           characters 56 to 67: 2<|im_end|>                               (see `spans`)
    input_ids      … <|im_start|> assistant \n         2          <|im_end|> \n   (see `tokens`)
    labels         … -100         -100      2          <|im_end|> -100       -100

The position of the new line must predict "2", the position of "2" the stop token. All other labels are -100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.render import refusals
from apollo_sft.data.render.conservation import Conservation, Lost, Part, lost_of
from apollo_sft.data.render.control_tokens import ControlTokenScan, special_tokens
from apollo_sft.data.render.counts import RenderCounts
from apollo_sft.data.render.layout import Layout, RowLayouts, trained_turns
from apollo_sft.data.render.renderings import UnprovableError
from apollo_sft.data.render.sandbox import RenderError, RunawayError
from apollo_sft.data.render.spans import Text
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.data.render.tokens import Encoder, TokenSpans
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, RowRef, Sample


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row that was rendered."""

    samples: list[Sample]
    """Before truncation."""

    dropped: str | None = None
    """Why the row is not trained, None where it is."""

    left_out: tuple[tuple[int, ...], str] = ((), "")
    """The turns that should have been trained and are in no sample, and why."""

    unwritten: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    """The turns that are trained without parts of the row's message, by the names of these parts."""

    lost: list[Lost] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """One row on its way from a conversation to samples."""

    conversation: Conversation

    control_token: str | None
    """The control token that its text spells, and where."""

    layout: Layout | None = None
    lost: list[Part] = field(default_factory=list)
    tokens: list[TokenSpans] = field(default_factory=list)
    """One for each text."""

    error: DataError | None = None


class Renderer:
    """Renders conversations with one template and one tokenizer. `counts` adds up over all calls.

    The samples of a row depend on this row alone. Raises: DataError for a slow tokenizer or a template that does not
    compile.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, data: DataConfig) -> None:
        self.template = template
        self.data = data
        self.encoder = Encoder(tokenizer)
        self.layouts = RowLayouts(tokenizer, template, data)
        self.sandbox = self.layouts.sandbox
        self.counts = RenderCounts()
        self.scan = ControlTokenScan(special_tokens(tokenizer))
        self.conservation = Conservation(self._texts_of)

    def render(self, conversations: Sequence[Conversation]) -> list[list[Sample]]:
        """Return the samples of each conversation, before truncation.

        Raises: DataError naming file, row, turn and template, for the first conversation that cannot be rendered.
        """
        rows = []
        for result in self.try_render(conversations):
            if isinstance(result, DataError):
                raise result
            rows.append(result.samples)
        return rows

    def try_render(self, conversations: Sequence[Conversation]) -> list[Rendered | DataError]:
        """Render as `render` does, with the error of a conversation in its place."""
        rows = [_Row(conversation, self.scan.first(conversation)) for conversation in conversations]
        with self.sandbox.bounded():
            for row in rows:
                self._try_lay_out(row)

        self._encode(rows)
        return [self._finished(row) if row.error is None else row.error for row in rows]

    def _try_lay_out(self, row: _Row) -> None:
        """Fill the layout of a row, or its error.

        Raises: DataError for a template that exceeds its limits, as it would on the rows that follow.
        """
        ref = row.conversation.ref
        if row.control_token is not None and self.data.special_tokens_in_content == "error":
            row.error = refusals.spells_control_token(ref, row.control_token)
            return

        # An error of one row leaves the others usable. A template that runs away would hold up every row.
        try:
            row.layout = self.layouts.lay_out(row.conversation)
            texts = [text.text for text in row.layout.texts]
            row.lost = self.conservation.lost(row.conversation, texts, self._trained(row.conversation))
        except UnprovableError as error:
            row.error = refusals.no_target_found(ref, error, self.template)
        except RenderError as error:
            row.error = refusals.template_fails(ref, error, self.template)
        except RunawayError as error:
            raise refusals.template_runs_away(ref, error) from error

    def _texts_of(self, conversation: Conversation) -> list[str]:
        return [text.text for text in self.layouts.lay_out(conversation).texts]

    def _trained(self, conversation: Conversation) -> list[int]:
        return trained_turns(conversation, self.data.train_on)

    def _encode(self, rows: Sequence[_Row]) -> None:
        """Fill the tokens of all rows, or the error of a row with a target that has none."""
        laid_out = [(row, row.layout.texts) for row in rows if row.layout is not None]
        every: list[Text] = []
        for _, texts in laid_out:
            every += texts
        encoded = iter(self.encoder.encode(every))
        for row, texts in laid_out:
            # All of the row's tokens are taken, also after an error: the next row's follow them.
            for found in [next(encoded) for _ in texts]:
                if isinstance(found, TokenSpans):
                    row.tokens.append(found)
                elif row.error is None:
                    row.error = refusals.no_target_found(row.conversation.ref, found, self.template)

    def _finished(self, row: _Row) -> Rendered:
        """Make the samples of a row, and count what was found in it."""
        assert row.layout is not None, "a row without one has an error"
        ref = row.conversation.ref
        pairs = list(zip(row.layout.texts, row.tokens, strict=True))
        samples = [_sample(ref, text, tokens) for text, tokens in pairs]
        # Such a row is rendered all the same: the ledger records how many tokens and targets are lost with it.
        if row.control_token is not None and self.data.special_tokens_in_content == "drop":
            self.counts.add("control_tokens_dropped", ref)
            return Rendered(samples, f"{row.control_token} (data.special_tokens_in_content=drop)")

        self.counts.add("control_tokens", ref, int(row.control_token is not None))
        self.counts.add("expanded_rows", ref, int(len(pairs) > 1))
        self.counts.add("thinking_off", ref, len(row.layout.thinking_off))
        unwritten: dict[tuple[str, ...], list[int]] = {}
        for text, tokens in pairs:
            missing = self.counts.add_sample(row.conversation, text, tokens)
            for turn, parts in missing.items():
                unwritten.setdefault(parts, []).append(turn)
        left_out = self._left_out(row.conversation, row.layout.texts, samples)
        return Rendered(samples, None, left_out, unwritten, self._lost(row))

    def _lost(self, row: _Row) -> list[Lost]:
        """Return what is said in a row and is in none of its texts; count it."""
        ref = row.conversation.ref
        parts = row.lost
        if self.layouts.format.before_reasoning is not None:
            # The template writes reasoning, but not that of earlier turns: so it is at inference too.
            parts = [part for part in row.lost if part.key != "reasoning"]
            self.counts.add("reasoning_left_out", ref, len(row.lost) - len(parts))

        found = lost_of(row.conversation, parts)
        self.counts.add("lost_parts", ref, sum(max(len(lost.messages), 1) for lost in found))
        return found

    def _left_out(
        self, conversation: Conversation, texts: Sequence[Text], samples: Sequence[Sample]
    ) -> tuple[tuple[int, ...], str]:
        """Return the turns that should have been trained and are in no sample, and why; count them."""
        trained: set[int] = set()
        for sample in samples:
            trained.update(sample.turns)
        found: set[int] = set()
        for text in texts:
            found.update(span.turn for span in text.spans)

        wanted = self._trained(conversation)
        blank = tuple(i for i in wanted if i in found and i not in trained)
        if blank:
            self.counts.add("blank_turns", conversation.ref, len(blank))
            return blank, "the reply is blank and the template writes no stop token, so it has no target"

        name = "turns_left_out"
        why = "turns that the template rewrites are not trained (data.history=last_turn)"
        if self.sandbox.marks_generation(conversation.tools is not None):
            name = "unmarked_turns"
            why = "the template's generation tags leave turns out"
        left_out = tuple(i for i in wanted if i not in found)
        self.counts.add(name, conversation.ref, len(left_out))
        return left_out, why


def _sample(ref: RowRef, text: Text, tokens: TokenSpans) -> Sample:
    # Generation tags may split a turn into several spans; it is named once. A blank reply without a stop has no target.
    turns: dict[int, None] = {}
    for span, (first, end) in zip(text.spans, tokens.ranges, strict=True):
        if first < end:
            turns[span.turn] = None
    return Sample(tokens.ids, shifted_labels(tokens.ids, tokens.ranges), ref, tuple(turns))


def shifted_labels(ids: np.ndarray, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return labels, int32: `labels[t]` is `ids[t + 1]` where token t + 1 is in a range, else IGNORE_INDEX.

    This is the one shift. A token at position 0 has nothing before it from which it could be predicted, so it is never
    a label.
    """
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    for first, end in ranges:
        first = max(first, 1)
        labels[first - 1 : max(end - 1, 0)] = ids[first:end]
    return labels


def truncate(sample: Sample, max_length: int, side: str, bos: int | None = None) -> Sample:
    """Cut a sample to at most `max_length` tokens, on `side` (left or right), labels with them.

    On the right the last position that stays predicts nothing: what it would predict is cut. On the left a first
    token `bos` stays, and predicts nothing.
    """
    ids = sample.input_ids
    labels = sample.labels
    if len(ids) <= max_length:
        return sample

    if side == "right":
        labels = labels[:max_length].copy()
        labels[-1] = IGNORE_INDEX
        return Sample(ids[:max_length], labels, sample.ref, sample.turns)

    # A text that begins with this token at inference begins with it after a cut too.
    if ids[0] == bos:
        ids = np.concatenate([ids[:1], ids[1 - max_length :]])
        labels = np.concatenate([[np.int32(IGNORE_INDEX)], labels[1 - max_length :]]).astype(np.int32)
    return Sample(ids[-max_length:], labels[-max_length:], sample.ref, sample.turns)
