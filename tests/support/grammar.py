"""Random small chat templates, each as jinja text and as Python that says what a model reads and writes under it.

The Python is the oracle of the renderer and shares no code with it: it knows how the template is made, and the renderer
has to find out from renderings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Template:
    """One template. Two of `header` and `closing` stand around the role, `stop` behind each message."""

    opening: str
    closing: str
    stop: str
    after: str
    """White space behind the stop."""

    begin: str
    """Stands before the first message."""

    default_system: str
    """Written where the first message is not the system's; "" for none."""

    prompts: str
    """When a generation prompt is written: always, not_behind_replies."""

    thinking: str
    """none: it knows no reasoning. by_request: enable_thinking=false closes a block in the prompt. always: the prompt
    opens a block. closed: the prompt closes an empty block that no reply has."""

    history: str
    """Whether replies keep their reasoning when a user's message follows: kept, dropped."""

    empty_block: bool
    """A last reply without reasoning has an empty block."""

    trims: bool
    needs_user: bool
    tags: str
    """Generation tags: none, content, header."""

    moves: bool
    """The message before a reply ends with a line break only as long as no reply follows."""

    def jinja(self) -> str:
        """The text of the template."""
        parts = []
        if self.needs_user:
            parts.append(
                "{% if not (messages | selectattr('role', 'eq', 'user') | list) %}"
                "{{ raise_exception('A user is needed.') }}{% endif %}"
            )
        parts.append("{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}")
        parts.append("{% set ns.last = loop.index0 %}{% endif %}{% endfor %}")
        parts.append("{% for m in messages %}{% if loop.first %}{{ " + repr(self.begin) + " }}")
        if self.default_system:
            system = self._message("system", self.default_system)
            parts.append("{% if m.role != 'system' %}{{ " + repr(system) + " }}{% endif %}")
        parts.append("{% endif %}")

        header = "{{ " + repr(self.opening) + " + m.role + " + repr(self.closing) + " }}"
        content = "{{ m.content | trim }}" if self.trims else "{{ m.content }}"
        stop = "{{ " + repr(self.stop) + " }}"
        after = "{{ " + repr(self.after) + " }}"
        body = self._jinja_block() + content + stop
        generated = {
            "none": header + body + after,
            "content": header + "{% generation %}" + body + "{% endgeneration %}" + after,
            "header": "{% generation %}" + header + body + after + "{% endgeneration %}",
        }[self.tags]
        moved = "{% if loop.last %}{{ '\\n' }}{% endif %}" if self.moves else ""
        parts.append("{% if m.role == 'assistant' %}" + generated + "{% else %}")
        parts.append(header + content + moved + stop + after + "{% endif %}{% endfor %}")
        parts.append(self._jinja_prompt())
        return "".join(parts)

    def _jinja_block(self) -> str:
        if self.thinking in ("none", "closed"):
            return ""
        wanted = "m.reasoning_content"
        if self.history == "dropped":
            wanted = "m.reasoning_content and loop.index0 > ns.last"
        written = "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"
        empty = ""
        if self.empty_block:
            empty = "{% elif loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}"
        return "{% if " + wanted + " %}" + written + empty + "{% endif %}"

    def _jinja_prompt(self) -> str:
        condition = "add_generation_prompt"
        if self.prompts == "not_behind_replies":
            condition += " and messages and messages[-1].role != 'assistant'"
        prompt = "{{ " + repr(self.opening + "assistant" + self.closing) + " }}"
        if self.thinking == "by_request":
            off = "enable_thinking is defined and enable_thinking is false"
            prompt += "{% if " + off + " %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        if self.thinking == "always":
            prompt += "{{ '<think>\\n' }}"
        if self.thinking == "closed":
            prompt += "{{ '<quiet></quiet>' }}"
        return "{% if " + condition + " %}" + prompt + "{% endif %}"

    # What a model reads and writes

    def _message(self, role: str, text: str) -> str:
        return self.opening + role + self.closing + text + self.stop + self.after

    def _content(self, message: Message) -> str:
        text: str = message["content"]
        return text.strip() if self.trims else text

    def _block(self, message: Message, is_current: bool) -> str:
        """The block of reasoning. `is_current`: no user's message follows."""
        reasoning = message.get("reasoning_content")
        if self.thinking in ("none", "closed"):
            return ""
        if reasoning and (is_current or self.history == "kept"):
            return f"<think>\n{reasoning}\n</think>\n\n"
        if self.empty_block and is_current:
            return "<think>\n\n</think>\n\n"
        return ""

    def context(self, messages: Sequence[Message], is_end: bool) -> str:
        """What these messages are before a reply, without a generation prompt. `is_end`: no reply is rendered."""
        text = self.begin
        if self.default_system and (not messages or messages[0]["role"] != "system"):
            text += self._message("system", self.default_system)

        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        last_user = max(users, default=-1)
        for index, message in enumerate(messages):
            body = self._content(message)
            if message["role"] == "assistant":
                body = self._block(message, index > last_user) + body
            elif self.moves and is_end and index == len(messages) - 1:
                body += "\n"
            text += self._message(message["role"], body)
        return text

    def turn(self, messages: Sequence[Message], index: int) -> tuple[str, str]:
        """What the model has read before reply `index`, and what it writes, through its stop."""
        reply = messages[index]
        earlier = messages[:index]
        has_user = any(message["role"] == "user" for message in earlier)
        # The model is not asked for a greeting, nor can it be where the template refuses the prompt, or writes none.
        is_refused = self.needs_user and not has_user
        has_prompt = self.prompts == "always" or (index > 0 and messages[index - 1]["role"] != "assistant")
        is_asked = index > 0 and not is_refused and has_prompt

        before = self.context(earlier, is_asked) + self.opening + "assistant" + self.closing
        said = self._block(reply, is_current=not is_refused) + self._content(reply) + self.stop
        prefill = ""
        if self.thinking == "by_request" and not reply.get("reasoning_content"):
            prefill = "<think>\n\n</think>\n\n"
        elif self.thinking == "always":
            prefill = "<think>\n"
        elif self.thinking == "closed":
            prefill = "<quiet></quiet>"

        if said.startswith(prefill):
            return before + prefill, said.removeprefix(prefill)
        if is_asked and self.thinking != "always":
            return before + prefill, said
        return before, said


def draw(rng: random.Random) -> Template:
    """A random template."""
    opening, closing = rng.choice(
        [("<|im_start|>", "\n"), ("<|", "|>"), ("<|", "|>\n"), ("<|im_start|>", "<|end|>\n\n")]
    )
    thinking = rng.choice(["none", "none", "by_request", "by_request", "always", "closed"])
    return Template(
        opening=opening,
        closing=closing,
        stop=rng.choice(["<|im_end|>", "<|end|>", "<|endoftext|>"]),
        after=rng.choice(["", "\n", "\n\n"]),
        begin=rng.choice(["", "<|endoftext|>", "[BEGIN] "]),
        default_system=rng.choice(["", "", "Be kind to all."]),
        prompts=rng.choice(["always", "always", "not_behind_replies"]),
        thinking=thinking,
        history=rng.choice(["kept", "dropped"]),
        empty_block=rng.random() < 0.5,
        trims=rng.random() < 0.4,
        needs_user=rng.random() < 0.3,
        tags=rng.choice(["none", "none", "content", "header"]),
        moves=rng.random() < 0.2,
    )


TEXTS = [
    "Hello.",
    "the answer is four",
    " two ",
    "x = 1\n",
    "é ü 二",
    "<them>",
    "<think",
    "one\n\ntwo",
    "assistant\n",
    "4",
    "",
]
SPECIAL_ORDERS = ("assistant_first", "twice", "ends_with_user", "system_first", "tool")


def conversation(rng: random.Random, reasoning: bool) -> list[Message]:
    """A random conversation, with at least one message of the user and one of the assistant."""

    def said(role: str) -> Message:
        message: Message = {"role": role, "content": rng.choice(TEXTS)}
        if role == "assistant" and reasoning and rng.random() < 0.5:
            message["reasoning_content"] = rng.choice(["hm", "let me see\nfour"])
        return message

    kinds = {kind for kind in SPECIAL_ORDERS if rng.random() < 0.25}
    messages = [said("system")] if "system_first" in kinds else []
    if "assistant_first" in kinds:
        messages.append(said("assistant"))
    for _ in range(rng.randint(1, 3)):
        messages += [said("user"), said("assistant")]
        if "tool" in kinds:
            messages += [said("tool"), said("assistant")]
        if "twice" in kinds and rng.random() < 0.5:
            messages.append(said("assistant"))
    if "ends_with_user" in kinds:
        messages.append(said("user"))
    return messages
