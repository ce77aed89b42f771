"""Lay out a row: the texts that are trained, with the spans of their targets. See `spans`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.render.control_tokens import control_tokens
from apollo_sft.data.render.message_forms import (
    THINK_TAGS,
    CallStyle,
    call_names,
    with_call_form,
    with_content_parts,
    with_reasoning_names,
)
from apollo_sft.data.render.renderings import Renderings, UnprovableError
from apollo_sft.data.render.reply_format import MARK, Render, ReplyFormat
from apollo_sft.data.render.sandbox import RenderError, RunawayError, Sandbox
from apollo_sft.data.render.spans import Text, lay_out, within_generation_tags
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.data.render.thinking import ThinkingChoice
from apollo_sft.types import Conversation, Message


@dataclass(frozen=True, slots=True)
class Layout:
    """The texts of one row."""

    texts: list[Text]

    style: CallStyle
    """The form in which its tool calls were given to the template."""

    thinking_off: frozenset[int]
    """The turns that count as replies with thinking off because they have no reasoning."""


class RowLayouts:
    """Lays out rows with one template. The layout of a row depends on this row alone.

    Raises: DataError for a template that does not compile.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, data: DataConfig) -> None:
        self.data = data
        day = datetime.combine(date.fromisoformat(data.template_date), time())
        kwargs = {"strftime_now": lambda form: day.strftime(form)} | dict(tokenizer.special_tokens_map)
        self.sandbox = Sandbox(template, kwargs | dict(data.apply_chat_template_kwargs))
        self.takes_parts = False
        with self.sandbox.bounded():
            render = self._render_with(None)
            self.takes_parts = _takes_parts(render)
            self.format = ReplyFormat.probe(render, control_tokens(tokenizer, template), tokenizer.eos_token)
            self.styles = call_styles(render)

    def lay_out(self, conversation: Conversation) -> Layout:
        """Return the texts of one row with their target spans. Call it inside of `sandbox.bounded`.

        Of the styles of tool calls the first is taken with which every call is written, and where there is none, the
        first that the template accepts.
        Raises: RenderError, UnprovableError.
        """
        if not any("tool_calls" in message for message in conversation.messages):
            return self._lay_out(conversation, CallStyle.PLAIN)

        # A template cannot be asked what it reads, and one that ignores a form leaves the calls out without an error.
        failure: RenderError | UnprovableError | None = None
        fallback: Layout | None = None
        for style in self.styles:
            try:
                layout = self._lay_out(conversation, style)
            except (RenderError, UnprovableError) as error:
                failure = failure or error
                continue
            if _writes_calls(conversation, layout.texts):
                return layout
            fallback = fallback or layout

        if fallback is None:
            assert failure is not None, "every style either fails or gives texts"
            raise failure
        return fallback

    def _lay_out(self, conversation: Conversation, style: CallStyle) -> Layout:
        named = with_reasoning_names(conversation.messages, self._reasoning_tags())
        messages = [with_call_form(message, style) for message in named]
        choice = self._thinking_of(conversation)
        render = self._render_with(conversation.tools)
        made: dict[int, Renderings] = {}

        def renderings_of(index: int | None) -> Renderings:
            arguments = choice.given
            if index is not None:
                arguments = choice.arguments(*_next_reply(index, conversation.messages))
            if id(arguments) not in made:
                made[id(arguments)] = Renderings(messages, render, self.format, arguments)
            return made[id(arguments)]

        trained = trained_turns(conversation, self.data.train_on)
        texts = lay_out(renderings_of, trained, self.data.history, self.data.thinking == "none")
        if self.sandbox.marks_generation(conversation.tools is not None):
            texts = [self._within_tags(text, messages, conversation.tools) for text in texts]

        off = [turn for turn in trained if choice.is_inferred_off(turn, conversation.messages[turn])]
        if self.format.usual_prompt(choice.by_request[False]) == self.format.usual_prompt(choice.given):
            off = []  # it is what the template does without a request too
        return Layout(texts, style, frozenset(off))

    def _reasoning_tags(self) -> list[tuple[str, str]]:
        """Return the tags around reasoning in a content that is given to the template under a key of its own."""
        if self.format.before_reasoning is None:
            return []  # the template would leave it out
        if self.format.reasoning_tags is None:
            return [THINK_TAGS]
        return [self.format.reasoning_tags, THINK_TAGS]

    def _thinking_of(self, conversation: Conversation) -> ThinkingChoice:
        is_fixed = self.data.thinking == "all" or self.format.switch in self.data.apply_chat_template_kwargs
        return ThinkingChoice.of(conversation, self.format, is_fixed)

    def _render_with(self, tools: list[dict[str, Any]] | None) -> Render:
        """Return a function that renders messages with these tools."""

        def render(messages: Sequence[Message], add_generation_prompt: bool, arguments: dict[str, Any]) -> str:
            messages = self._given(messages)
            return self.sandbox.render(messages, tools, arguments, add_generation_prompt)

        return render

    def _given(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return messages with their contents in the form that the template reads."""
        if self.takes_parts:
            return [with_content_parts(message) for message in messages]
        return messages

    def _within_tags(self, text: Text, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> Text:
        """Return a text whose targets are those that the template's generation tags mark."""
        read = self._given(messages[: text.num_messages])
        marked = self.sandbox.generated(read, tools, text.arguments, add_generation_prompt=False)
        if text.joined_at is not None:
            # What was joined is the end of this rendering; what stands before it comes from that of the prompt.
            whole = self.sandbox.render(read, tools, text.arguments, add_generation_prompt=False)
            moved = len(text.text) - len(whole)
            marked = [(first + moved, last + moved) for first, last in marked if last + moved > text.joined_at]
            asked = self._given(messages[: text.spans[-1].turn])
            earlier = self.sandbox.generated(asked, tools, text.arguments, add_generation_prompt=True)
            marked = [(first, last) for first, last in earlier if first < text.joined_at] + marked
        return within_generation_tags(text, marked, self.format)


def trained_turns(conversation: Conversation, train_on: str) -> list[int]:
    """Return the messages that are trained: `data.train_on`, without those that the row takes out."""
    everyone = range(len(conversation.messages))
    assistant = [i for i in everyone if conversation.messages[i]["role"] == "assistant"]
    chosen = {"assistant": assistant, "last": assistant[-1:], "all": everyone}[train_on]
    return [i for i in chosen if i not in conversation.untrained]


def _takes_parts(render: Render) -> bool:
    """Return whether the template writes contents only where they are lists of parts."""
    user: Message = {"role": "user", "content": MARK}
    try:
        return MARK not in render([user], True, {}) and MARK in render([with_content_parts(user)], True, {})
    except (RenderError, RunawayError):
        return False


def call_styles(render: Render) -> list[CallStyle]:
    """Return the styles of tool calls in the order in which they are tried: first those that the template writes."""
    call = {"type": "function", "function": {"name": MARK, "arguments": {"a": "b"}}}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}

    def is_written(style: CallStyle) -> bool:
        try:
            text = render([{"role": "user", "content": "c"}, with_call_form(reply, style)], False, {})
        except (RenderError, RunawayError):
            return False
        # Where arguments should be JSON text, a dict comes out as Python writes it.
        return MARK in text and "{'a': 'b'}" not in text

    return sorted(CallStyle, key=lambda style: not is_written(style))


def _next_reply(index: int, messages: Sequence[Message]) -> tuple[int, Message]:
    """Return message `index`, or the next one that is the assistant's: what stands before a reply was read for it."""
    for later in range(index, len(messages)):
        if messages[later]["role"] == "assistant":
            return later, messages[later]
    return index, messages[index]


def _writes_calls(conversation: Conversation, texts: Sequence[Text]) -> bool:
    """Return whether every tool call is written: a trained one in its target, each other one in a text."""
    targets: dict[int, str] = {}
    for text in texts:
        for span in text.spans:
            targets[span.turn] = targets.get(span.turn, "") + text.text[span.start : span.end]
    whole = "".join(text.text for text in texts)

    for index, message in enumerate(conversation.messages):
        written = targets.get(index, whole)
        if not all(name in written for name in call_names(message)):
            return False
    return True
