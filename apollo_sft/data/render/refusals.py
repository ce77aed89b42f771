"""Word the errors about rows that cannot be rendered: what, found, expected, fix."""

from __future__ import annotations

from apollo_sft.data.render.renderings import UnprovableError
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.errors import DataError
from apollo_sft.types import RowRef


def spells_control_token(ref: RowRef, found: str) -> DataError:
    """Return the error about a row whose text spells a control token."""
    return DataError(
        f"{ref}: the text spells a control token of the tokenizer",
        found=found,
        expected="text that cannot forge a turn",
        fix="data.special_tokens_in_content=drop (leaves such rows out) or allow (trains them as they are)",
    )


def no_target_found(ref: RowRef, error: UnprovableError, template: ChatTemplate) -> DataError:
    """Return the error about a turn whose target cannot be found."""
    return DataError(
        f"{ref}, turn {error.turn}: the target of this turn cannot be located, {error}",
        expected=f"a turn that is rendered alike at inference and in training (template: {template.source})",
        fix="another data.chat_template, other data.apply_chat_template_kwargs, or rows of one turn",
    )


def template_fails(ref: RowRef, error: Exception, template: ChatTemplate) -> DataError:
    """Return the error about a conversation that the template does not accept."""
    return DataError(
        f"{ref}: the chat template fails on this conversation, {error}",
        expected=f"messages that the template accepts (template: {template.source})",
        fix="change the row, or data.chat_template",
    )


def template_runs_away(ref: RowRef, error: Exception) -> DataError:
    """Return the error about a template that exceeds its limits."""
    return DataError(
        f"{ref}: the chat template does not come to an end on this conversation",
        found=str(error),
        fix="another data.chat_template",
    )
