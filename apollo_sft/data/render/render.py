"""Conversation -> Samples: text, spans of targets, tokens once, and the one shift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from itertools import groupby
from typing import Any

import numpy as np

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.conversation import Forgeries
from apollo_sft.data.render.replies import missing_parts
from apollo_sft.data.render.sandbox import (
    WAYS,
    RenderError,
    RunawayError,
    Sandbox,
    call_names,
    handed_over,
    with_reasoning_names,
)
from apollo_sft.data.render.spans import Dialogue, Habits, Text, UnprovableError, as_marked, lay_out
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.data.render.tokens import Encoder, TokenSpans, control_tokens, special_tokens
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, Message, RowRef, Sample

NAMED_EXAMPLES = 5


@dataclass(slots=True)
class RenderCounts:
    """What was met so far. `stop_tokens`: how often each token id ended a turn.

    `found`: how often each of the names in `audit.FINDINGS`; `first`: the first rows of each.
    """

    turns: int = 0
    found: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    stop_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, name: str, ref: RowRef, count: int = 1) -> None:
        if count:
            self.found[name] += count
            examples = self.first.setdefault(name, [])
            if len(examples) < NAMED_EXAMPLES and str(ref) not in examples:
                examples.append(str(ref))


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row: its samples, before truncation. `dropped`: why it is not to be trained, None where it is.

    `left_out`: the turns that should have been trained and are in no sample, and why. `unwritten`: turns that are
    trained without a part that the row has, by the names of such parts.
    """

    samples: list[Sample]
    dropped: str | None = None
    left_out: tuple[tuple[int, ...], str] = ((), "")
    unwritten: dict[tuple[str, ...], list[int]] = field(default_factory=dict)


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
        self.way: tuple[bool, bool] | None = None
        self.forgeries = Forgeries(special_tokens(tokenizer))
        with self.sandbox.bounded():
            controls = control_tokens(tokenizer, template)
            self.habits = Habits.of(lambda m, g: self.sandbox.render(m, None, {}, g), controls, tokenizer.eos_token)

    def render(self, conversations: Sequence[Conversation]) -> list[list[Sample]]:
        """The samples of each conversation, before truncation.

        Raises: DataError naming file, row, turn and template, for the first conversation that cannot be rendered.
        """
        rows = []
        for result in self.try_render(conversations):
            if isinstance(result, DataError):
                raise result
            rows.append(result.samples)
        return rows

    def try_render(self, conversations: Sequence[Conversation]) -> list[Rendered | DataError]:
        """As `render`, with the error of a conversation in its place."""
        forged = [self.forgeries.first(conversation) for conversation in conversations]
        with self.sandbox.bounded():
            laid_out = [self._try_lay_out(*pair) for pair in zip(conversations, forged, strict=True)]
        encoded = iter(self.encoder.encode([text for texts in laid_out if isinstance(texts, list) for text in texts]))
        results: list[Rendered | DataError] = []
        for conversation, why, texts in zip(conversations, forged, laid_out, strict=True):
            tokens = [next(encoded) for _ in texts] if isinstance(texts, list) else []
            error = next((item for item in tokens if isinstance(item, UnprovableError)), None)
            if isinstance(texts, DataError):
                results.append(texts)
            elif error is not None:
                results.append(self._refusal(conversation.ref, error))
            else:
                pairs = [(text, item) for text, item in zip(texts, tokens, strict=True) if isinstance(item, TokenSpans)]
                results.append(self._rendered(conversation, pairs, why))
        return results

    def lay_out(self, conversation: Conversation) -> list[Text]:
        """The renderings of one row and their target spans.

        Raises: RenderError, UnprovableError.
        """
        has_calls = any("tool_calls" in message for message in conversation.messages)
        ways = (self.way, *WAYS) if self.way is not None else WAYS if has_calls else WAYS[:1]
        failed: RenderError | UnprovableError | None = None
        poor: tuple[tuple[bool, bool], list[Text]] | None = None
        for way in ways:
            try:
                texts = self._lay_out(conversation, way)
            except (RenderError, UnprovableError) as error:
                failed = failed or error
                continue
            if not has_calls or self.way == way or _writes_calls(conversation, texts):
                self.way = way if has_calls else self.way
                return texts
            poor = poor or (way, texts)
        if poor is None:
            assert failed is not None, "every way either fails or gives texts"
            raise failed
        self.way = poor[0]
        return poor[1]

    def _lay_out(self, conversation: Conversation, way: tuple[bool, bool]) -> list[Text]:
        messages = [handed_over(message, *way) for message in with_reasoning_names(conversation.messages)]

        def render(some: Sequence[Message], add_generation_prompt: bool) -> str:
            return self.sandbox.render(some, conversation.tools, conversation.template_kwargs, add_generation_prompt)

        dialogue = Dialogue(messages, render, self.habits)
        texts = lay_out(dialogue, trained_turns(conversation, self.data.train_on), self.data.history)
        tools, kwargs = conversation.tools, conversation.template_kwargs
        if not self.sandbox.marks_generation(tools is not None):
            return texts
        marked = [self.sandbox.generated(messages[: text.num_messages], tools, kwargs) for text in texts]
        return [as_marked(text, stretches, self.habits) for text, stretches in zip(texts, marked, strict=True)]

    def _try_lay_out(self, conversation: Conversation, forged: str | None) -> list[Text] | DataError:
        if forged is not None and self.data.special_tokens_in_content == "error":
            return DataError(
                f"{conversation.ref}: the text spells a control token of the tokenizer",
                found=forged,
                expected="text that cannot forge a turn",
                fix="data.special_tokens_in_content=drop (leaves such rows out) or allow (trains them as they are)",
            )
        try:
            return self.lay_out(conversation)
        except UnprovableError as error:
            return self._refusal(conversation.ref, error)
        except RunawayError as error:
            raise DataError(
                f"{conversation.ref}: the chat template does not come to an end on this conversation",
                found=str(error),
                fix="another data.chat_template",
            ) from error
        except RenderError as error:
            return DataError(
                f"{conversation.ref}: the chat template fails on this conversation",
                found=str(error),
                expected=f"messages that the template accepts (template: {self.template.source})",
                fix="change the row, or data.chat_template",
            )

    def _refusal(self, ref: RowRef, error: UnprovableError) -> DataError:
        return DataError(
            f"{ref}, turn {error.turn}: what the model says in this turn cannot be located",
            found=str(error),
            expected=f"a turn that is rendered alike at inference and in training (template: {self.template.source})",
            fix="another data.chat_template, other data.apply_chat_template_kwargs, or rows of one turn",
        )

    def _rendered(
        self, conversation: Conversation, pairs: Sequence[tuple[Text, TokenSpans]], forged: str | None
    ) -> Rendered:
        drop = forged is not None and self.data.special_tokens_in_content == "drop"
        samples = [_sample(conversation.ref, text, tokens) for text, tokens in pairs]
        if drop:
            self.counts.add("control_tokens_dropped", conversation.ref)
            return Rendered(samples, f"{forged} (data.special_tokens_in_content=drop)")
        self.counts.add("control_tokens", conversation.ref, forged is not None)
        self.counts.add("expanded_rows", conversation.ref, len(pairs) > 1)
        unwritten: dict[tuple[str, ...], list[int]] = {}
        for text, tokens in pairs:
            self._count(conversation, text, tokens, unwritten)
        done = {turn for sample in samples for turn in sample.turns}
        left_out = tuple(i for i in trained_turns(conversation, self.data.train_on) if i not in done)
        if self.sandbox.marks_generation(conversation.tools is not None):
            name, why = "unmarked_turns", "the template's generation tags leave turns out"
        else:
            name, why = "turns_left_out", "turns that the template rewrites are not trained (data.history=last_turn)"
        self.counts.add(name, conversation.ref, len(left_out))
        return Rendered(samples, None, (left_out, why), unwritten)

    def _count(
        self,
        conversation: Conversation,
        text: Text,
        tokens: TokenSpans,
        unwritten: dict[tuple[str, ...], list[int]],
    ) -> None:
        """Count what was met in one sample. `unwritten` grows by its turns that lack a part."""
        counts, ref = self.counts, conversation.ref
        counts.add("cut_turns", ref, tokens.num_cuts)
        pairs = zip(text.spans, tokens.ranges, strict=True)
        for turn, group in groupby(pairs, key=lambda pair: pair[0].turn):
            spans, ranges = zip(*group, strict=True)
            message, last = conversation.messages[turn], spans[-1]
            said = "".join([text.text[span.start : span.end] for span in spans])
            missing = missing_parts(message, said)
            if missing:
                unwritten.setdefault(missing, []).append(turn)
            counts.turns += 1
            met = {
                "unpredictable_targets": ranges[0][0] == 0 < ranges[0][1],
                "turns_without_stop": last.stop is None,
                "second_stops": last.second_stop,
                "unopened_turns": spans[0].unopened,
                "rewritten_turns": spans[0].rewritten,
                "unwritten_turns": bool(missing),
                "trained_headers": self.habits.header != "" and said.lstrip().startswith(self.habits.header),
                "empty_replies": "tool_calls" not in message and not message["content"].strip(),
            }
            if True in met.values():
                for name, is_met in met.items():
                    counts.add(name, ref, is_met)
            if last.stop is not None:
                counts.stop_tokens[int(tokens.ids[ranges[-1][1] - 1])] += 1


def _sample(ref: RowRef, text: Text, tokens: TokenSpans) -> Sample:
    turns = tuple(dict.fromkeys(span.turn for span in text.spans))
    return Sample(tokens.ids, shifted_labels(tokens.ids, tokens.ranges), ref, turns)


def trained_turns(conversation: Conversation, train_on: str) -> list[int]:
    """The messages that are trained: `data.train_on`, without those that the row takes out."""
    everyone = range(len(conversation.messages))
    assistant = [i for i in everyone if conversation.messages[i]["role"] == "assistant"]
    chosen = {"assistant": assistant, "last": assistant[-1:], "all": everyone}[train_on]
    return [i for i in chosen if i not in conversation.untrained]


def _writes_calls(conversation: Conversation, texts: Sequence[Text]) -> bool:
    """Whether every trained tool call is in its target."""
    spans = [(span, text.text) for text in texts for span in text.spans]
    return all(
        name in text[span.start : span.end]
        for span, text in spans
        for name in call_names(conversation.messages[span.turn])
    )


def shifted_labels(ids: np.ndarray, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """The one shift: `labels[t]` is `ids[t + 1]` where token t + 1 is in a range, else IGNORE_INDEX.

    A token at position 0 has nothing before it from which it could be predicted, so it is never a label.
    """
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    for first, end in ranges:
        first = max(first, 1)
        labels[first - 1 : max(end - 1, 0)] = ids[first:end]
    return labels


def truncate(sample: Sample, max_length: int, side: str, bos: int | None = None) -> Sample:
    """At most `max_length` tokens, cut on `side` (left or right), labels with them.

    On the right the last position that stays predicts nothing: what it would predict is cut. On the left a first
    token `bos` stays, and predicts nothing.
    """
    ids, labels = sample.input_ids, sample.labels
    if len(ids) <= max_length:
        return sample
    if side == "right":
        labels = labels[:max_length].copy()
        labels[-1] = IGNORE_INDEX
        return Sample(ids[:max_length], labels, sample.ref, sample.turns)
    if ids[0] == bos:
        ids = np.concatenate([ids[:1], ids[1 - max_length :]])
        labels = np.concatenate([[np.int32(IGNORE_INDEX)], labels[1 - max_length :]]).astype(np.int32)
    return Sample(ids[-max_length:], labels[-max_length:], sample.ref, sample.turns)
