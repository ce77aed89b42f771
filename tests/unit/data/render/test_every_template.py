"""Every template of the shared inputs: each reply has the context and the target of inference, or a reason why not.

The oracle knows the role header and the stop of each template by name, from reading it, and renders with transformers.
Context: the prompt that the template writes before the reply. Target: what it writes for the reply behind its header.
The table in the docs: `APOLLO_WRITE_DOCS=1 pytest tests/unit/data/render/test_every_template.py`.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from apollo_sft.data.read.conversation import parse_row
from apollo_sft.data.render.message_forms import with_call_form
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.renderings import UnprovableError
from apollo_sft.data.render.sandbox import RenderError
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.types import Conversation, Message, RowRef
from tests.support.data import chat, data_config
from tests.support.documents import section, table

SHARED = Path(__file__).resolve().parents[4].parent / "shared"
ROWS = Path(__file__).resolve().parents[3] / "fixtures" / "targets" / "conversations.json"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]

CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
DEEPSEEK = ("<｜Assistant｜>", "<｜end▁of▁sentence｜>")
GEMMA = ("<start_of_turn>model\n", "<end_of_turn>")
LLAMA = ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
MARKS = {
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3", "deepseekv3_training"), DEEPSEEK),
    **dict.fromkeys(("gemma3", "gemma3_training"), GEMMA),
    "gemma4": ("<|turn>model\n", "<turn|>"),
    "glm4moe": ("<|assistant|>", ""),
    "gptoss": ("<|start|>assistant", "<|return|>"),
    "granite3_3": ("<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>"),
    **dict.fromkeys(("llama3", "llama3_training"), LLAMA),
    "mistral_nemo": ("[/INST]", "</s>"),
    "phi3": ("<|assistant|>\n", "<|end|>"),
    **dict.fromkeys(
        (
            *("hermes2_tool_use", "nemotron_3_nano", "nemotron_3_nano_training", "qwen2_5", "qwen2_5_training"),
            *("qwen3", "qwen3_5_think", "qwen3_5_think_training", "qwen3_instruct_2507", "qwen3_training", "qwq_32b"),
            *("smollm2", "smollm3"),
        ),
        CHATML,
    ),
}
"""Template -> its role header of a reply, and its stop."""

SWITCHED = {
    **dict.fromkeys(("gemma4", "glm4moe", "nemotron_3_nano", "nemotron_3_nano_training", "qwen3"), "enable_thinking"),
    **dict.fromkeys(("qwen3_5_think", "qwen3_5_think_training", "qwen3_training", "qwq_32b"), "enable_thinking"),
    "smollm3": "enable_thinking",
    "granite3_3": "thinking",
}
"""Templates that think by request, and the argument."""

OPENING_ONLY = {"deepseek_r1_distill": "<think>\n", "deepseekv3": "<think>\n", "deepseekv3_training": "<think>\n"}
"""Templates whose prompts open a block that no reply continues, and that have no prompt without it."""


WRITE_REASONING = (
    *("glm4moe", "gptoss", "nemotron_3_nano", "nemotron_3_nano_training", "qwen3", "qwen3_training"),
    *("qwen3_5_think", "qwen3_5_think_training"),
)
"""Templates that write a reasoning that has a key of its own."""


def reasoned(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content} | more


KINDS: dict[str, list[Message]] = {
    "developer": [{"role": "developer", "content": "Be kind."}, *chat("Hi.", "Hello.")],
    "system later": [*chat("Hi.", "Hello."), {"role": "system", "content": "Be brief."}, *chat("And?", "Bye.")],
    "assistant first": [*chat("", "Welcome.")[1:], *chat("Hi.", "Hello.")],
    "system, assistant": [{"role": "system", "content": "Shop."}, *chat("", "Welcome.")[1:], *chat("Hi.", "Hello.")],
    "two replies": [*chat("Hi.", "First."), *chat("", "Second.")[1:], *chat("And?", "Third.")],
    "ends with user": chat("Hi.", "Hello.", "Bye?"),
    "reasoning first": [*chat("2+2?"), reasoned("4", reasoning_content="two and two"), *chat("Sure?", "Yes.")],
    "reasoning later": [*chat("Hi.", "Hello.", "2+2?"), reasoned("4", reasoning_content="two and two")],
    "reasoning inline": [*chat("2+2?"), reasoned("<think>\ntwo and two\n</think>\n\n4")],
    "reasoning empty": [*chat("2+2?"), reasoned("4", reasoning_content="")],
    "edges": chat("  Indent it. ", "    x = 1\n", " \n", "\ttwo  "),
    "look-alike": chat("What is <think>?", "<thin line", "And </s", "<|im_en"),
} | {name: row["messages"] for name, row in json.loads(ROWS.read_text(encoding="utf-8")).items()}
TOOLS = {name: row.get("tools") for name, row in json.loads(ROWS.read_text(encoding="utf-8")).items()}


@cache
def tokenizer() -> Any:
    """With the special tokens of all the templates."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    found.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    marks = [mark for pair in MARKS.values() for mark in pair]
    written = [
        "<|start|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|user|>",
        "<|observation|>",
        "<|turn>",
        "<|im_start|>",
    ]
    wanted = sorted({token.strip() for token in (*marks, *written) if token.strip()[:1] + token.strip()[-1:] == "<>"})
    found.add_special_tokens({"additional_special_tokens": wanted}, replace_extra_special_tokens=False)
    return found


def text_of(template: str) -> str:
    return (SHARED / "templates" / f"{template}.jinja").read_text(encoding="utf-8")


@cache
def compiled(template: str) -> Any:
    return chat_template_utils._compile_jinja_template(text_of(template))


def expected(template: str, row: Conversation, messages: list[Message], index: int, thinking: str) -> tuple[str, str]:
    """Context and target of one reply by the oracle."""
    header, _ = MARKS[template]
    reply = row.messages[index]
    thinks = reply["content"].startswith("<think>")
    if template in WRITE_REASONING:
        thinks = thinks or bool(reply.get("reasoning_content"))
    arguments: dict[str, Any] = dict(tokenizer().special_tokens_map) | {"strftime_now": datetime(2025, 1, 1).strftime}
    if template in SWITCHED and thinking == "auto":
        arguments[SWITCHED[template]] = thinks

    def render(number: int, asked: bool) -> str:
        given = arguments | {"messages": messages[:number], "tools": row.tools, "documents": None}
        text: str = compiled(template).render(add_generation_prompt=asked, **given)
        return text

    end = next(number for number in range(index + 1, len(messages) + 1) if renders(render, number))
    whole = render(end, False)
    prompt = render(index, True) if index and renders(render, index) else None
    # Behind the output of a tool the reply may go on without a header.
    has_header = prompt is not None and (header in prompt[-len(header) - 40 :] or messages[index - 1]["role"] == "tool")
    if prompt is not None and has_header and whole.startswith(prompt):
        return prompt, ended(template, whole[len(prompt) :], end > index + 1)

    before, _, said = whole.rpartition(header)
    if end > index + 1:  # the template refuses a conversation that ends with this reply
        before, _, said = whole.partition(header)
    said = ended(template, said, end > index + 1)
    # What the prompt of a question opens or closes behind the header is not written a second time by the model.
    asked = compiled(template).render(add_generation_prompt=True, **arguments, messages=chat("Hi."), documents=None)
    for opened in (asked.rpartition(header)[2], asked.rpartition(header)[2].strip()):
        if opened and said.startswith(opened):
            said = said.removeprefix(opened)
            break
    else:
        opened = ""
    if prompt is None or not has_header:
        # A greeting, or a template that writes no prompt here: what it writes itself is the context.
        return before + header + opened, said
    return prompt.removesuffix(OPENING_ONLY.get(template, "")), said


def given(template: str, message: Message) -> Message:
    """A message as the template reads it: reasoning under a key of its own, which gpt-oss calls thinking."""
    reasoning = message.get("reasoning_content") or ""
    content = message["content"] or ""
    if template in WRITE_REASONING and content.startswith("<think>\n"):
        reasoning, _, content = content.removeprefix("<think>\n").partition("\n</think>\n\n")
        message = message | {"content": content}
    without = {key: value for key, value in message.items() if key != "reasoning_content"}
    if not reasoning:
        return without
    return without | {"reasoning_content": reasoning, "thinking": reasoning}


def renders(render: Any, number: int) -> bool:
    try:
        render(number, False)
    except Exception:  # a template may raise anything
        return False
    return True


def ended(template: str, said: str, is_followed: bool) -> str:
    """A reply through its stop."""
    _, stop = MARKS[template]
    if is_followed and stop:
        return said.partition(stop)[0] + stop
    return said.rstrip()


@cache
def renderer(template: str, thinking: str) -> Renderer:
    data = data_config(multiturn=True, thinking=thinking)
    return Renderer(tokenizer(), ChatTemplate(text_of(template), template), data)


def cell(template: str, kind: str, thinking: str) -> str:
    """What happens to one conversation under one template: right, wrong with the reason, or refused."""
    one = renderer(template, thinking)
    row = parse_row({"messages": KINDS[kind], "tools": TOOLS.get(kind)}, RowRef(kind, 0), one.data)
    with one.sandbox.bounded():
        try:
            layout = one.layouts.lay_out(row)
        except RenderError as error:
            return f"refused: {str(error).partition(': ')[2]}"
        except UnprovableError as error:
            return f"refused: {error}"

    found = {
        span.turn: (text.text[: span.start], text.text[span.start : span.end])
        for text in layout.texts
        for span in text.spans
    }
    replies = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    if sorted(found) != replies:
        return f"wrong: turns {sorted(found)}"
    for index, (context, target) in found.items():
        messages = [given(template, with_call_form(message, layout.style)) for message in row.messages]
        before, said = expected(template, row, messages, index, thinking)
        if context != before or not same_target(template, target, said):
            return f"wrong: turn {index} is {context[-60:]!r} {target!r}, not {before[-60:]!r} {said!r}"
    return "right"


NEXT_ROLES = ("", "<|user|>", "<|observation|>", "<|system|>", "<|assistant|>")


def same_target(template: str, target: str, wanted: str) -> bool:
    """Equal, but for what ends a reply otherwise when others follow: the next role (GLM), no second end (Phi-3)."""
    if template == "glm4moe":
        return target.removesuffix(wanted) == "" or target.removeprefix(wanted) in NEXT_ROLES
    if template == "phi3":
        return wanted in (target, f"{target}\n</s>")
    if template == "gptoss":
        return target in (wanted, wanted.removesuffix("<|return|>") + "<|end|>")
    return target == wanted


def all_cells() -> dict[tuple[str, str, str], str]:
    found = {}
    for template in MARKS:
        for kind in KINDS:
            for thinking in ("auto", "all"):
                found[template, kind, thinking] = cell(template, kind, thinking)
    return found


def test_every_template_of_the_folder_is_here() -> None:
    assert sorted(MARKS) == sorted(path.stem for path in (SHARED / "templates").glob("*.jinja"))


def test_no_cell_is_wrong_and_the_table_in_the_docs_is_current() -> None:
    cells = all_cells()
    wrong = {place: found for place, found in cells.items() if found.startswith("wrong")}
    assert not wrong, "\n".join(f"{place}: {found}" for place, found in wrong.items())

    rows = []
    reasons: dict[str, list[str]] = {}
    for template in MARKS:
        found = [cells[template, kind, "auto"] for kind in KINDS]
        rows.append([template, *(text.partition(":")[0] for text in found)])
        for kind, text in zip(KINDS, found, strict=True):
            if text.startswith("refused"):
                reasons.setdefault(f"{template}: {text.removeprefix('refused: ')}", []).append(kind)

    number = sum(text == "right" for text in cells.values())
    text = f"{number} of {len(cells)} cells are right, with `data.thinking=auto` and `all`; the others are refused. "
    text += "The table shows `auto`.\n\n"
    text += table(["template", *KINDS], rows) + "\nWhy rows are refused:\n\n"
    text += "".join(f"* {reason} ({', '.join(kinds)})\n" for reason, kinds in reasons.items())
    assert section("templates.md", "every template", text) == text
