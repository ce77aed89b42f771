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
from datetime import date, datetime, time
from typing import Any

import numpy as np

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.render import refusals
from apollo_sft.data.render.control_tokens import ControlTokenScan, control_tokens, special_tokens
from apollo_sft.data.render.counts import RenderCounts
from apollo_sft.data.render.message_forms import CallStyle, call_names, with_call_form, with_reasoning_names
from apollo_sft.data.render.reply_format import ReplyFormat
from apollo_sft.data.render.sandbox import RenderError, RunawayError, Sandbox
from apollo_sft.data.render.spans import Text, lay_out, within_generation_tags
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.data.render.tokens import Encoder, TokenSpans
from apollo_sft.data.render.turns import Renderings, UnprovableError
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, Message, RowRef, Sample


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


@dataclass(slots=True)
class _Row:
    """One row on its way from a conversation to samples."""

    conversation: Conversation

    control_token: str | None
    """The control token that its text spells, and where."""

    texts: list[Text] = field(default_factory=list)
    tokens: list[TokenSpans] = field(default_factory=list)
    """One for each text."""

    error: DataError | None = None


class Renderer:
    """Renders conversations with one template and one tokenizer. `counts` adds up over all calls.

    Raises: DataError for a slow tokenizer or a template that does not compile.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, data: DataConfig) -> None:
        self.template = template
        self.data = data
        self.encoder = Encoder(tokenizer)
        day = datetime.combine(date.fromisoformat(data.template_date), time())
        kwargs = {"strftime_now": lambda form: day.strftime(form)} | dict(tokenizer.special_tokens_map)
        self.sandbox = Sandbox(template, kwargs | dict(data.apply_chat_template_kwargs))
        self.counts = RenderCounts()
        self.scan = ControlTokenScan(special_tokens(tokenizer))

        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return self.sandbox.render(messages, None, {}, add_generation_prompt)

        with self.sandbox.bounded():
            self.format = ReplyFormat.probe(render, control_tokens(tokenizer, template), tokenizer.eos_token)

    def render(self, conversations: Sequence[Conversation], first_try: CallStyle | None = None) -> list[list[Sample]]:
        """Return the samples of each conversation, before truncation. `first_try`: see `lay_out`.

        Raises: DataError naming file, row, turn and template, for the first conversation that cannot be rendered.
        """
        rows = []
        for result in self.try_render(conversations, first_try):
            if isinstance(result, DataError):
                raise result
            rows.append(result.samples)
        return rows

    def try_render(
        self, conversations: Sequence[Conversation], first_try: CallStyle | None = None
    ) -> list[Rendered | DataError]:
        """Render as `render` does, with the error of a conversation in its place.

        The style of tool calls that fits one conversation is tried first on the next, so results depend on which
        conversations are rendered together, and on nothing that was rendered before.
        """
        rows = [_Row(conversation, self.scan.first(conversation)) for conversation in conversations]
        with self.sandbox.bounded():
            style = first_try
            for row in rows:
                style = self._try_lay_out(row, style)

        self._encode(rows)
        return [self._finished(row) if row.error is None else row.error for row in rows]

    def lay_out(
        self, conversation: Conversation, first_try: CallStyle | None = None
    ) -> tuple[CallStyle | None, list[Text]]:
        """Return the texts of one row with their target spans, and the style of tool calls to try first on the next.

        A style fits when every trained tool call is in its target. `first_try` fits when the template accepts it. Where
        none fits, the first style that the template accepts is taken. Call it inside of `sandbox.bounded`.

        Raises: RenderError, UnprovableError.
        """
        if not any("tool_calls" in message for message in conversation.messages):
            return first_try, self._lay_out(conversation, CallStyle.PLAIN)

        # A template cannot be asked what it reads, and one that ignores a form leaves the calls out without an error.
        failure: RenderError | UnprovableError | None = None
        fallback: tuple[CallStyle, list[Text]] | None = None
        for style in sorted(CallStyle, key=lambda style: style is not first_try):
            try:
                texts = self._lay_out(conversation, style)
            except (RenderError, UnprovableError) as error:
                failure = failure or error
                continue
            if style is first_try or _writes_calls(conversation, texts):
                return style, texts
            fallback = fallback or (style, texts)

        if fallback is None:
            assert failure is not None, "every style either fails or gives texts"
            raise failure
        return fallback

    def _lay_out(self, conversation: Conversation, style: CallStyle) -> list[Text]:
        tools = conversation.tools
        kwargs = conversation.template_kwargs
        messages = [with_call_form(message, style) for message in with_reasoning_names(conversation.messages)]

        def render(some: Sequence[Message], add_generation_prompt: bool) -> str:
            return self.sandbox.render(some, tools, kwargs, add_generation_prompt)

        renderings = Renderings(messages, render, self.format)
        texts = lay_out(renderings, trained_turns(conversation, self.data.train_on), self.data.history)
        if not self.sandbox.marks_generation(tools is not None):
            return texts

        marked = [self.sandbox.generated(messages[: text.num_messages], tools, kwargs) for text in texts]
        return [within_generation_tags(text, ranges, self.format) for text, ranges in zip(texts, marked, strict=True)]

    def _try_lay_out(self, row: _Row, first_try: CallStyle | None) -> CallStyle | None:
        """Fill the texts of a row, or its error. Returns the style to try first on the next row.

        Raises: DataError for a template that exceeds its limits, as it would on the rows that follow.
        """
        ref = row.conversation.ref
        if row.control_token is not None and self.data.special_tokens_in_content == "error":
            row.error = refusals.spells_control_token(ref, row.control_token)
            return first_try

        # An error of one row leaves the others usable. A template that runs away would hold up every row.
        try:
            style, row.texts = self.lay_out(row.conversation, first_try)
        except UnprovableError as error:
            row.error = refusals.no_target_found(ref, error, self.template)
        except RenderError as error:
            row.error = refusals.template_fails(ref, error, self.template)
        except RunawayError as error:
            raise refusals.template_runs_away(ref, error) from error
        else:
            return style
        return first_try

    def _encode(self, rows: Sequence[_Row]) -> None:
        """Fill the tokens of all rows, or the error of a row with a target that has none."""
        texts: list[Text] = []
        for row in rows:
            texts += row.texts
        encoded = iter(self.encoder.encode(texts))
        for row in rows:
            # All of the row's tokens are taken, also after an error: the next row's follow them.
            for found in [next(encoded) for _ in row.texts]:
                if isinstance(found, TokenSpans):
                    row.tokens.append(found)
                elif row.error is None:
                    row.error = refusals.no_target_found(row.conversation.ref, found, self.template)

    def _finished(self, row: _Row) -> Rendered:
        """Make the samples of a row, and count what was found in it."""
        ref = row.conversation.ref
        pairs = list(zip(row.texts, row.tokens, strict=True))
        samples = [_sample(ref, text, tokens) for text, tokens in pairs]
        # Such a row is rendered all the same: the ledger records how many tokens and targets are lost with it.
        if row.control_token is not None and self.data.special_tokens_in_content == "drop":
            self.counts.add("control_tokens_dropped", ref)
            return Rendered(samples, f"{row.control_token} (data.special_tokens_in_content=drop)")

        self.counts.add("control_tokens", ref, int(row.control_token is not None))
        self.counts.add("expanded_rows", ref, int(len(pairs) > 1))
        unwritten: dict[tuple[str, ...], list[int]] = {}
        for text, tokens in pairs:
            missing = self.counts.add_sample(row.conversation, text, tokens, self.format.header)
            for turn, parts in missing.items():
                unwritten.setdefault(parts, []).append(turn)
        return Rendered(samples, None, self._left_out(row.conversation, samples), unwritten)

    def _left_out(self, conversation: Conversation, samples: Sequence[Sample]) -> tuple[tuple[int, ...], str]:
        """Return the turns that should have been trained and are in no sample, and why; count them."""
        trained: set[int] = set()
        for sample in samples:
            trained.update(sample.turns)

        name = "turns_left_out"
        why = "turns that the template rewrites are not trained (data.history=last_turn)"
        if self.sandbox.marks_generation(conversation.tools is not None):
            name = "unmarked_turns"
            why = "the template's generation tags leave turns out"

        left_out = tuple(i for i in trained_turns(conversation, self.data.train_on) if i not in trained)
        self.counts.add(name, conversation.ref, len(left_out))
        return left_out, why


def trained_turns(conversation: Conversation, train_on: str) -> list[int]:
    """Return the messages that are trained: `data.train_on`, without those that the row takes out."""
    everyone = range(len(conversation.messages))
    assistant = [i for i in everyone if conversation.messages[i]["role"] == "assistant"]
    chosen = {"assistant": assistant, "last": assistant[-1:], "all": everyone}[train_on]
    return [i for i in chosen if i not in conversation.untrained]


def _writes_calls(conversation: Conversation, texts: Sequence[Text]) -> bool:
    """Return whether every trained tool call is in its target."""
    for text in texts:
        for span in text.spans:
            target = text.text[span.start : span.end]
            if not all(name in target for name in call_names(conversation.messages[span.turn])):
                return False
    return True


def _sample(ref: RowRef, text: Text, tokens: TokenSpans) -> Sample:
    # Generation tags may split a turn into several spans; it is named once.
    turns = tuple(dict.fromkeys(span.turn for span in text.spans))
    return Sample(tokens.ids, shifted_labels(tokens.ids, tokens.ranges), ref, turns)


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
