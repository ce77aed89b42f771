"""Conversation -> Samples: text once, spans of targets, tokens once, and the one shift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.sandbox import RenderError, Sandbox, with_reasoning_names
from apollo_sft.data.spans import UnprovableError, find_spans
from apollo_sft.data.template import ChatTemplate
from apollo_sft.data.tokens import Encoder, Text, TokenSpans
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, RowRef, Sample


@dataclass(slots=True)
class RenderCounts:
    """What was met so far. `stop_tokens`: how often each token id ended a turn."""

    turns: int = 0
    cut_turns: int = 0
    turns_without_stop: int = 0
    unpredictable_targets: int = 0
    empty_replies: int = 0
    stop_tokens: Counter[int] = field(default_factory=Counter)


class Renderer:
    """Renders conversations with one template and one tokenizer. `counts` adds up over all calls.

    Raises: DataError for a slow tokenizer or a template that does not compile.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, data: DataConfig) -> None:
        self.template = template
        self.encoder = Encoder(tokenizer)
        self.sandbox = Sandbox(template, dict(tokenizer.special_tokens_map) | dict(data.apply_chat_template_kwargs))
        self.stops = stop_candidates(tokenizer, template)
        self.counts = RenderCounts()

    def render(self, conversations: Sequence[Conversation]) -> list[list[Sample]]:
        """The samples of each conversation, before truncation; today always one.

        Raises: DataError naming file, row, turn and template, for the first conversation that cannot be rendered.
        """
        samples = []
        for result in self.try_render(conversations):
            if isinstance(result, DataError):
                raise result
            samples.append(result)
        return samples

    def try_render(self, conversations: Sequence[Conversation]) -> list[list[Sample] | DataError]:
        """As `render`, with the error of a conversation in its place."""
        with self.sandbox.bounded():
            laid_out = [self._try_lay_out(conversation) for conversation in conversations]
        encoded = iter(self.encoder.encode([text for text in laid_out if isinstance(text, Text)]))
        results: list[list[Sample] | DataError] = []
        for conversation, text in zip(conversations, laid_out, strict=True):
            if isinstance(text, DataError):
                results.append(text)
                continue
            tokens = next(encoded)
            if isinstance(tokens, UnprovableError):
                results.append(self._refusal(conversation.ref, tokens))
            else:
                results.append([self._sample(conversation, text, tokens)])
        return results

    def lay_out(self, conversation: Conversation) -> Text:
        """The whole rendering and its target spans.

        Raises: RenderError, UnprovableError.
        """
        messages = with_reasoning_names(conversation.messages)

        def render(num_messages: int, add_generation_prompt: bool) -> str:
            return self.sandbox.render(
                messages[:num_messages], conversation.tools, conversation.template_kwargs, add_generation_prompt
            )

        return Text(*find_spans(messages, render, self.stops))

    def _try_lay_out(self, conversation: Conversation) -> Text | DataError:
        try:
            return self.lay_out(conversation)
        except UnprovableError as error:
            return self._refusal(conversation.ref, error)
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

    def _sample(self, conversation: Conversation, text: Text, tokens: TokenSpans) -> Sample:
        self._count(conversation, text, tokens)
        turns = tuple(span.turn for span in text.spans)
        return Sample(tokens.ids, shifted_labels(tokens.ids, tokens.ranges), conversation.ref, turns)

    def _count(self, conversation: Conversation, text: Text, tokens: TokenSpans) -> None:
        counts = self.counts
        counts.turns += len(text.spans)
        counts.cut_turns += tokens.num_cuts
        for span, (first, end) in zip(text.spans, tokens.ranges, strict=True):
            counts.unpredictable_targets += first == 0 and end > 0
            if span.stop is None:
                counts.turns_without_stop += 1
            else:
                counts.stop_tokens[int(tokens.ids[end - 1])] += 1
            message = conversation.messages[span.turn]
            counts.empty_replies += not message["content"].strip() and "tool_calls" not in message


def shifted_labels(ids: np.ndarray, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """The one shift: `labels[t]` is `ids[t + 1]` where token t + 1 is in a range, else IGNORE_INDEX.

    A token at position 0 has nothing before it from which it could be predicted, so it is never a label.
    """
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    for first, end in ranges:
        first = max(first, 1)
        labels[first - 1 : max(end - 1, 0)] = ids[first:end]
    return labels


def truncate(sample: Sample, max_length: int, side: str) -> Sample:
    """At most `max_length` tokens, cut on `side` (left or right), labels with them.

    On the right the last position that stays predicts nothing: what it would predict is cut.
    """
    if len(sample.input_ids) <= max_length:
        return sample
    if side == "left":
        return Sample(sample.input_ids[-max_length:], sample.labels[-max_length:], sample.ref, sample.turns)
    labels = sample.labels[:max_length].copy()
    labels[-1] = IGNORE_INDEX
    return Sample(sample.input_ids[:max_length], labels, sample.ref, sample.turns)


def stop_candidates(tokenizer: Any, template: ChatTemplate) -> tuple[str, ...]:
    """The tokens that can end a turn, longest first: special tokens, and added ones that the template writes."""
    texts = template.text + template.text_for(True)
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content in texts:
            found.add(token.content)
    return tuple(sorted(found - {""}, key=lambda text: (-len(text), text)))
