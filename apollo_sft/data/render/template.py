"""Choose the chat template, and record where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_sft.config.schema import DataConfig
from apollo_sft.errors import DataError

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

PLAIN = (
    "{%- for message in messages -%}{{- message.content -}}"
    "{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
)
"""For base models: the contents one after another, without anything between them, the end token after each answer."""

CHOICES = "a path to a jinja file, jinja text, `chatml` or `plain`"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template and its origin."""

    text: str
    """Jinja text."""

    source: str
    """The origin, in words."""

    tool_text: str | None = None
    """Jinja text for rows with tools, where the tokenizer has a template of its own for them."""

    def text_for(self, has_tools: bool) -> str:
        """Return the jinja text for rows with or without tools."""
        if has_tools and self.tool_text is not None:
            return self.tool_text
        return self.text


def resolve_template(tokenizer: Any, data: DataConfig) -> ChatTemplate:
    """Return the template that `data.chat_template` names; null is the tokenizer's own.

    Raises: DataError when there is none, or `plain` does not fit the tokenizer.
    """
    wanted = data.chat_template
    if wanted is None:
        return _own(tokenizer)
    if wanted == "chatml":
        return ChatTemplate(CHATML, "built-in chatml")
    if wanted == "plain":
        return _plain(tokenizer)
    if "{{" in wanted or "{%" in wanted:
        return ChatTemplate(wanted, "data.chat_template (jinja text)")
    return _from_file(wanted)


def is_own(tokenizer: Any, template: ChatTemplate) -> bool:
    """Return whether the template is the one that the tokenizer brings; of several by name, the default one."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return bool(template.text == own)


def _own(tokenizer: Any) -> ChatTemplate:
    # Some models have several templates by name: one for tools, another one for all else.
    own = tokenizer.chat_template
    if isinstance(own, dict) and "default" in own:
        return ChatTemplate(own["default"], "the tokenizer's own", own.get("tool_use"))
    if isinstance(own, str) and own:
        return ChatTemplate(own, "the tokenizer's own")

    found = "none"
    if isinstance(own, dict):
        found = f"named templates {', '.join(own)}, none of them `default`"
    raise DataError(
        "the tokenizer has no chat template (data.chat_template)",
        found=found,
        expected=CHOICES,
        fix="data.chat_template=chatml (where its tokens are missing, with model.add_special_tokens=true), "
        "or data.chat_template=plain for prompt + response + end token",
    )


def _plain(tokenizer: Any) -> ChatTemplate:
    if tokenizer.eos_token is None:
        raise DataError("data.chat_template=plain needs a tokenizer with an end token", found="eos_token is null")

    # A prompt at inference begins with the BOS token where the tokenizer adds one, so the training text does too.
    bos = tokenizer.bos_token_id
    text = PLAIN
    if bos is not None and tokenizer("a")["input_ids"][0] == bos:
        text = "{{- bos_token -}}" + PLAIN
    return ChatTemplate(text, "built-in plain")


def _from_file(wanted: str) -> ChatTemplate:
    path = Path(wanted).expanduser()
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), wanted)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            "data.chat_template cannot be read as a file", found=f"{wanted}: {reason}", expected=CHOICES
        ) from error
