r"""Choose how each reply was asked for: with thinking or without.

Many templates think or not by request. Qwen3 with `enable_thinking=false` closes an empty block in the prompt:

    thinking on    …<|im_start|>assistant\n                              the model writes <think>\nhm\n</think>\n\n2
    thinking off   …<|im_start|>assistant\n<think>\n\n</think>\n\n       the model writes 2

A reply "2" without reasoning is what the model says with thinking off. With thinking on it would have to write the
empty block first, and a model that learns this stops thinking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apollo_sft.data.render.message_forms import has_reasoning, split_reasoning
from apollo_sft.data.render.reply_format import ReplyFormat
from apollo_sft.types import Conversation, Message

TemplateArguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ThinkingChoice:
    """The template arguments with which the replies of one row were asked for."""

    given: TemplateArguments
    """The row's own arguments."""

    by_request: Mapping[bool, TemplateArguments]
    """The same with thinking switched on, and off."""

    of_messages: Mapping[int, bool]
    """What messages say themselves, by their index."""

    writes_reasoning: bool
    """The template writes the reasoning that a message has under a key of its own. What is not written was not said."""

    is_given: bool
    """The row or the configuration decides for every message that says nothing itself."""

    @classmethod
    def of(cls, conversation: Conversation, reply_format: ReplyFormat, is_fixed: bool) -> ThinkingChoice:
        """Return the choice for one row. `is_fixed`: the configuration decides."""
        switch = reply_format.switch
        writes = reply_format.before_reasoning is not None
        given = conversation.template_kwargs
        if switch is None:
            return cls(given, {True: given, False: given}, {}, writes, is_given=True)

        by_request = {state: given | {switch: state} for state in (True, False)}
        return cls(given, by_request, conversation.thinking, writes, is_fixed or switch in given)

    def arguments(self, index: int, message: Message) -> TemplateArguments:
        """Return the template arguments with which message `index` was asked for."""
        state = self.of_messages.get(index)
        if state is None and self.is_given:
            return self.given
        if state is None:
            state = self._thinks(message)
        return self.by_request[state]

    def is_inferred_off(self, index: int, message: Message) -> bool:
        """Return whether the reply counts as one with thinking off only because it has no reasoning."""
        return not self.is_given and index not in self.of_messages and not self._thinks(message)

    def _thinks(self, message: Message) -> bool:
        if self.writes_reasoning:
            return has_reasoning(message)
        return split_reasoning(message.get("content") or "")[1] is not None
