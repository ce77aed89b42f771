"""Greedy answers of any model folder by plain transformers, and how many of them are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from apollo_sft.errors import DataError
from apollo_sft.types import Message

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BOXED = "\\boxed{"


def load_for_generation(folder: str | Path) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face folder or hub id, in the stored dtype, on the GPU when there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[Message]],
    max_new_tokens: int = 256,
    batch_size: int = 32,
    template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """What the model says next, greedily, for each prompt: a question, or the messages of a conversation so far.

    Prompts go through the tokenizer's chat template with a generation prompt, and in batches padded on the left, the
    longest first. Answers come in the order of the prompts, without the stop token and without special tokens.

    Raises: DataError when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so a prompt cannot be rendered",
            fix="set tokenizer.chat_template, or use a folder that this trainer wrote: it keeps the template",
        )
    conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True, **(template_kwargs or {}))
        for c in conversations
    ]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    answers = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _generate_batch(model, tokenizer, [texts[i] for i in chosen], max_new_tokens)
        for i, answer in zip(chosen, batch, strict=True):
            answers[i] = answer
    return answers


def final_answer(text: str) -> str | None:
    """The last final answer in `text`, normalised: what follows `####` on its line, or stands in `\\boxed{…}`.

    None when there is neither.
    """
    marker = text.rfind("####")
    boxed = text.rfind(BOXED)
    if marker < 0 and boxed < 0:
        return None
    if boxed > marker:
        return _normalise(_braced(text[boxed + len(BOXED) :]))
    rest = text[marker + len("####") :].strip()
    return _normalise(rest.split("\n", 1)[0])


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """The share of answers whose final answer is the truth's. A truth is a final answer, or a text that holds one.

    An answer without a final answer is wrong.
    """
    assert len(answers) == len(truths) > 0
    wanted = [_normalise(truth) if (found := final_answer(truth)) is None else found for truth in truths]
    return sum(final_answer(a) == w for a, w in zip(answers, wanted, strict=True)) / len(wanted)


@torch.no_grad()
def _generate_batch(model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int) -> list[str]:
    stops = _stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(len(row) for row in rows)
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    output = model.generate(inputs, attention_mask=mask, generation_config=greedy)
    return [_decode(tokenizer, ids, stops) for ids in output[:, width:].tolist()]


def _decode(tokenizer: Any, ids: list[int], stops: set[int]) -> str:
    """Text up to the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """What ends a reply: the generation config's ids where it names any, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return set(ids) if isinstance(ids, list) else {ids}


def _braced(text: str) -> str:
    """`text` up to the brace that closes the one before it; all of it when none does."""
    depth = 1
    for i, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return text[:i]
    return text


def _normalise(answer: str) -> str:
    """Without spaces, thousands separators, dollar signs and a full stop at the end: `$1,234.` is `1234`.

    Source: what GSM8K evaluations ignore.
    """
    bare = "".join(answer.split()).replace("\\$", "").replace("$", "").removesuffix(".")
    return THOUSANDS.sub("", bare)
