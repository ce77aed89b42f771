"""Find out how a template begins and ends a reply, from renderings of one short conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apollo_sft.data.render.sandbox import RenderError, RunawayError
from apollo_sft.data.render.text_search import before_cut_token, common_length, last_token, tokens_at_start
from apollo_sft.types import Message

Render = Callable[[Sequence[Message], bool, dict[str, Any]], str]
"""(messages, add_generation_prompt, template arguments of the row) -> text."""

MARK = "\ue000"
"""Replaces the content of a message; a character that no text has, and no white space."""

OTHER_MARK = "\ue001"
"""For a content that starts with `MARK`."""

THIRD_MARK = "\ue002"
"""For the reasoning, where all three are in one rendering."""

SWITCHES = ("enable_thinking", "thinking")
"""The template arguments that switch thinking on and off, in the order in which they are tried."""

MARKUP = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""A tag as templates write it: <think>, </think>, <|channel|>, [THINK]."""

USER = {"role": "user", "content": MARK}
REPLY = {"role": "assistant", "content": OTHER_MARK}
REASONED_REPLY = REPLY | {"reasoning_content": THIRD_MARK, "reasoning": THIRD_MARK, "thinking": THIRD_MARK}


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How a template begins and ends a reply."""

    control_tokens: tuple[str, ...]
    """Tokens that can end a reply, longest first."""

    eos: str | None
    """The end token of the tokenizer."""

    has_stop: bool = True
    """A reply ends with a control token of its own. Else the start of the next message may be its end (GLM)."""

    document_end: str | None = None
    """The token that ends the whole text behind the stop of its last reply (Phi-3), None where there is none."""

    header: str = ""
    """The text between a prompt and the content of its reply, where the template has no generation prompt. The model
    has to write it there, so it is trained. Empty where the contents follow one another."""

    switch: str | None = None
    """The argument that switches thinking on and off, None where no generation prompt depends on one."""

    generation_prompts: Mapping[bool | None, str] = field(default_factory=lambda: {None: ""})
    """What the template appends to a prompt: by default (None), with thinking switched on (true), and off (false)."""

    before_reasoning: str | None = None
    """What it writes between a prompt and the reasoning of a reply, None where it writes no reasoning."""

    reasoning_tags: tuple[str, str] | None = None
    """The tags around the reasoning, None where it has none on both sides."""

    @classmethod
    def probe(cls, render: Render, control_tokens: tuple[str, ...], eos: str | None) -> ReplyFormat:
        """Return the format of the template behind `render`."""
        found = cls(control_tokens, eos)
        try:
            return _with_reasoning(_with_prompts(_with_ends(found, render), render), render)
        except (RenderError, RunawayError):
            # The first row of the data fails in the same way, and its error names the row.
            return found

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

    def usual_prompt(self, arguments: Mapping[str, Any]) -> str:
        """Return the generation prompt behind a user's message, with these template arguments of a row."""
        state = None
        if self.switch is not None:
            state = arguments.get(self.switch)
        return self.generation_prompts.get(state, self.generation_prompts[None])

    def is_closed(self, generation_prompt: str, prefill: str) -> bool:
        """Return whether `prefill`, the end of a generation prompt, is complete: a reply is what follows behind it.

        A prefill that reasoning would follow (`<think>\\n`) is open. One that no reasoning follows
        (`<think>\\n\\n</think>`) is closed.
        """
        if not prefill.strip():
            return True
        if self.before_reasoning is not None:
            return generation_prompt.strip() not in self.before_reasoning

        # Nothing is known of where reasoning would stand. A block that is closed has two tags, or a closing one.
        tags = MARKUP.findall(prefill)
        return len(tags) > 1 or (len(tags) == 1 and tags[0][1] == "/")


def _with_ends(found: ReplyFormat, render: Render) -> ReplyFormat:
    """Return the format with what ends a reply, and the whole text. Raises: RenderError, RunawayError."""
    # With a generation prompt behind it the text is not at its end, so the template leaves `document_end` out.
    messages = [USER, REPLY]
    at_end = tokens_at_start(render(messages, False, {}).rpartition(OTHER_MARK)[2], found.control_tokens)
    before_prompt = tokens_at_start(render(messages, True, {}).rpartition(OTHER_MARK)[2], found.control_tokens)
    document_end = None
    if len(at_end) == 2 and before_prompt[:1] == at_end[:1] and before_prompt[1:2] != at_end[1:]:
        document_end = at_end[1]
    return replace(found, has_stop=bool(at_end), document_end=document_end)


def _with_prompts(found: ReplyFormat, render: Render) -> ReplyFormat:
    """Return the format with what the template appends to a prompt. Raises: RenderError, RunawayError."""
    switch = _switch(render)
    prompts: dict[bool | None, str] = {None: _appended(render, {}, found.control_tokens)}
    if switch is not None:
        for state in (True, False):
            prompts[state] = _appended(render, {switch: state}, found.control_tokens)

    header = ""
    question = render([USER], False, {})
    if question == render([USER], True, {}):
        whole = render([USER, REPLY], False, {})
        if whole.startswith(question):
            header = whole.removeprefix(question).partition(OTHER_MARK)[0].strip()
    return replace(found, header=header, switch=switch, generation_prompts=prompts)


def _with_reasoning(found: ReplyFormat, render: Render) -> ReplyFormat:
    """Return the format with what stands around the reasoning of a reply."""
    arguments = {}
    if found.switch is not None:
        arguments = {found.switch: True}
    try:
        question = render([USER], False, arguments)
        whole = render([USER, REASONED_REPLY], False, arguments)
    except (RenderError, RunawayError):
        return found

    before, mark, after = whole.partition(THIRD_MARK)
    start = common_length(question, before)
    if not mark or MARK not in before[:start]:
        return found

    start = before_cut_token((question, before), start, found.control_tokens)
    opening = MARKUP.findall(before[start:])
    closing = after.partition(OTHER_MARK)[0].strip()
    tags = None
    if opening and MARKUP.fullmatch(closing):
        tags = (opening[-1], closing)
    return replace(found, before_reasoning=before[start:], reasoning_tags=tags)


def _switch(render: Render) -> str | None:
    """Return the argument on which the generation prompt depends, None where there is none."""
    for name in SWITCHES:
        try:
            if render([USER], True, {name: True}) != render([USER], True, {name: False}):
                return name
        except (RenderError, RunawayError):
            continue
    return None


def _appended(render: Render, arguments: dict[str, Any], control_tokens: tuple[str, ...]) -> str:
    """Return what the template appends to a prompt. Raises: RenderError, RunawayError."""
    question = render([USER], False, arguments)
    prompt = render([USER], True, arguments)
    start = before_cut_token((question, prompt), common_length(question, prompt), control_tokens)
    return prompt[start:]
