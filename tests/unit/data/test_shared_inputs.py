"""Real data, templates and tokenizers: what is trained is the answer and its stop token, nothing else."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apollo_sft.data.read.conversation import needed_columns, parse_row
from apollo_sft.data.read.rows import read_rows
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.types import IGNORE_INDEX, Conversation, Sample
from tests.support.data import data_config

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
THINK = "<think>\n\n</think>\n\n"
SINGLE_TURN = {"prompt_key": "extra_info", "response_key": "extra_info"}

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]


@cache
def tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


def template_path(name: str) -> str:
    return str(SHARED / "templates" / f"{name}.jinja")


def conversations(file: str, num_rows: int, multiturn: bool) -> list[Conversation]:
    data = data_config(multiturn) if multiturn else data_config(**SINGLE_TURN)
    rows = read_rows([str(SHARED / "data" / file)], needed_columns(data), num_rows)
    return [parse_row(row, ref, data) for ref, row in rows]


def targets(sample: Sample, tok: Any) -> str:
    text: str = tok.decode(sample.labels[sample.labels != IGNORE_INDEX].tolist())
    return text


@pytest.mark.parametrize(
    ("tokenizer_name", "template", "kwargs", "before", "stop"),
    [
        ("smollm2", None, {}, "", "<|im_end|>"),
        ("smollm2", "smollm2", {}, "", "<|im_end|>"),
        ("smollm2", "qwen2_5", {}, "", "<|im_end|>"),
        ("qwen3", "smollm2", {}, "", "<|im_end|>"),
        ("qwen3", "qwen2_5", {}, "", "<|im_end|>"),
        ("qwen3", "qwen3_instruct_2507", {}, "", "<|im_end|>"),
        ("qwen3", "qwen3", {}, "", "<|im_end|>"),
        ("qwen3", "qwen3", {"enable_thinking": True}, THINK, "<|im_end|>"),
        ("qwen3", "qwen3", {"enable_thinking": False}, "", "<|im_end|>"),
        ("qwen3", "chatml", {}, "", "<|im_end|>"),
        ("phi3", None, {}, "", "<|end|>"),
        ("phi3", "phi3", {}, "", "<|end|>\n<|endoftext|>"),
        ("gpt2", "plain", {}, "", "<|endoftext|>"),
        ("phi3", "plain", {}, "", "<|endoftext|>"),
    ],
)
def test_gsm8k_targets_are_the_answer_and_the_stop_token(
    tokenizer_name: str, template: str | None, kwargs: dict[str, Any], before: str, stop: str
) -> None:
    tok = tokenizer(tokenizer_name)
    named = template if template in (None, "chatml", "plain") else template_path(str(template))
    data = data_config(**SINGLE_TURN, chat_template=named, apply_chat_template_kwargs=kwargs)
    resolved = resolve_template(tok, data)
    renderer = Renderer(tok, resolved, data)
    rows = conversations("gsm8k/single_turn/test.parquet", 64, multiturn=False)
    for row, [sample] in zip(rows, renderer.render(rows), strict=True):
        answer = row.messages[-1]["content"]
        assert targets(sample, tok) == tok.decode(tok(before + answer + stop, add_special_tokens=False)["input_ids"])
        whole = tok.apply_chat_template(row.messages, chat_template=resolved.text, return_dict=False, **kwargs)
        assert sample.input_ids.tolist() == whole
    assert set(renderer.counts.findings) <= {"second_stops", "thinking_off"}


@pytest.mark.parametrize("name", ["bfcl_toolcall", "lf_glaive_toolcall_en", "lf_reason_tool_use", "taskmaster4"])
def test_tool_conversations_under_qwen2_5(name: str) -> None:
    """The same ids as transformers gives, and every turn is calls and content as the template writes them."""
    tok = tokenizer("qwen3")
    data = data_config(multiturn=True, chat_template=template_path("qwen2_5"))
    resolved = resolve_template(tok, data)
    rows = conversations(f"{name}/messages/train.parquet", 20, multiturn=True)
    for row, [sample] in zip(rows, Renderer(tok, resolved, data).render(rows), strict=True):
        whole = tok.apply_chat_template(row.messages, row.tools, chat_template=resolved.text, return_dict=False)
        assert sample.input_ids.tolist() == whole
        spoken = [m for m in row.messages if m["role"] == "assistant"]
        assert sample.turns == tuple(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
        text = targets(sample, tok)
        assert text.count("<|im_end|>") == len(spoken)
        assert text.count("<tool_call>") == sum(len(m.get("tool_calls", [])) for m in spoken)
        assert "<|im_start|>" not in text
        assert "<tool_response>" not in text


@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_training", "qwen3_training"])
def test_the_training_template_s_own_marks_agree(template: str) -> None:
    """An independent oracle: the authors' own generation tags, but for white space at the edges.

    They mark an empty think block too, as data.thinking=all does.
    """
    tok = tokenizer("qwen3")
    data = data_config(multiturn=True, chat_template=template_path(template), thinking="all")
    text = Path(template_path(template.removesuffix("_training") + "_training")).read_text()
    rows = conversations("lf_glaive_toolcall_en/messages/train.parquet", 30, multiturn=True)
    for row, [sample] in zip(rows, Renderer(tok, resolve_template(tok, data), data).render(rows), strict=True):
        theirs = tok.apply_chat_template(
            row.messages, row.tools, chat_template=text, return_dict=True, return_assistant_tokens_mask=True
        )
        assert sample.input_ids.tolist() == theirs["input_ids"]
        ours = [False, *(sample.labels[:-1] != IGNORE_INDEX).tolist()]
        for token, mine, other in zip(theirs["input_ids"], ours, theirs["assistant_masks"], strict=True):
            assert mine == bool(other) or not tok.decode([token]).strip()


@pytest.mark.parametrize("name", ["lf_glaive_toolcall_en", "lf_reason_tool_use"])
def test_qwen3_trains_every_turn_as_inference_would_produce_it(name: str) -> None:
    """The ids before a turn are those of its generation prompt; it is what the template writes for a last turn."""
    tok = tokenizer("qwen3")
    data = data_config(multiturn=True, chat_template=template_path("qwen3"))
    text = Path(template_path("qwen3")).read_text()
    rows = conversations(f"{name}/messages/train.parquet", 20, multiturn=True)
    apply = partial(tok.apply_chat_template, chat_template=text, return_dict=False)
    for row, samples in zip(rows, Renderer(tok, resolve_template(tok, data), data).render(rows), strict=True):
        spoken = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        assert sorted(turn for sample in samples for turn in sample.turns) == spoken
        for sample in samples:
            is_target = np.append(False, sample.labels[:-1] != IGNORE_INDEX)
            for turn, first in zip(sample.turns, np.flatnonzero(np.diff(is_target, prepend=0) == 1), strict=True):
                # A reply without reasoning is what the model says with thinking off.
                thinks = any(row.messages[turn].get(name) for name in ("reasoning_content", "reasoning", "thinking"))
                prompt = apply(row.messages[:turn], row.tools, add_generation_prompt=True, enable_thinking=thinks)
                alone = apply(row.messages[: turn + 1], row.tools)
                assert sample.input_ids[:first].tolist() == prompt
                assert sample.input_ids[: len(alone) - 1].tolist() == alone[:-1]  # but for the last newline
                assert is_target[first : len(alone) - 1].all()


def test_the_whole_of_gsm8k_becomes_a_store(tmp_path: Path) -> None:
    tok = tokenizer("smollm2")
    data = data_config(multiturn=True, store_dir=str(tmp_path))
    folder = str(SHARED / "data/gsm8k/messages/test.parquet")
    request = StoreRequest("val", (folder,), -1, tok, resolve_template(tok, data), data)
    summary = prepare_store(request, lambda _: None).summary
    assert (summary.num_rows, summary.num_samples, summary.num_turns) == (1319, 1319, 1319)
    assert summary.findings == {}
    assert summary.stop_tokens == {tok.eos_token_id: 1319}
