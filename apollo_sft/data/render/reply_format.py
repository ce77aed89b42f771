"""Find out how a template begins and ends a reply, from renderings of one short conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apollo_sft.data.render.sandbox import RenderError, RunawayError
from apollo_sft.data.render.text_search import last_token, tokens_at_start
from apollo_sft.types import Message

Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text, always with the same template arguments."""

MARK = "\ue000"
"""Replaces the content of a message; a character that no text has, and no white space."""

OTHER_MARK = "\ue001"
"""For a content that starts with `MARK`."""


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How a template begins and ends a reply."""

    control_tokens: tuple[str, ...]
    """Tokens that can end a reply, longest first."""

    eos: str | None
    """The end token of the tokenizer."""

    has_stop: bool
    """A reply ends with a control token of its own. Else the start of the next message may be its end (GLM)."""

    document_end: str | None
    """The token that ends the whole text behind the stop of its last reply (Phi-3), None where there is none."""

    header: str = ""
    """The text between a prompt and the content of its reply, where the template has no generation prompt. The model
    has to write it there, so it is trained. Empty where the contents follow one another."""

    @classmethod
    def probe(cls, render: Render, control_tokens: tuple[str, ...], eos: str | None) -> ReplyFormat:
        """Return the format of the template behind `render`."""
        messages = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        try:
            whole = render(messages, False)
            whole_and_prompt = render(messages, True)
            question = render(messages[:1], False)
            question_and_prompt = render(messages[:1], True)
        except (RenderError, RunawayError):
            # The first row of the data fails in the same way, and its error names the row.
            return cls(control_tokens, eos, has_stop=True, document_end=None)

        # With a generation prompt behind it the text is not at its end, so the template leaves `document_end` out.
        at_end = tokens_at_start(whole.rpartition(MARK)[2], control_tokens)
        before_prompt = tokens_at_start(whole_and_prompt.rpartition(MARK)[2], control_tokens)
        document_end = None
        if len(at_end) == 2 and before_prompt[:1] == at_end[:1] and before_prompt[1:2] != at_end[1:]:
            document_end = at_end[1]

        header = ""
        has_generation_prompt = question != question_and_prompt
        if not has_generation_prompt and whole.startswith(question):
            header = whole.removeprefix(question).partition(MARK)[0].strip()
        return cls(control_tokens, eos, bool(at_end), document_end, header)

    def stop_token(self, text: str) -> str | None:
        """Return the control token at the end of `text` that ends a reply."""
        if not self.has_stop:
            return None
        return last_token(text, self.control_tokens)

    def without_document_end(self, text: str) -> str:
        """Return `text` without `document_end`, and the white space before it."""
        if self.document_end is None:
            return text
        return text.removesuffix(self.document_end).rstrip()
