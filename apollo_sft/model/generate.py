"""Greedy answers of any model folder by plain transformers, and the share of them that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from apollo_sft.errors import DataError, ModelError
from apollo_sft.model.final_answers import BOX, MARKER, THOUSANDS, braced
from apollo_sft.types import Message, ignore

Z95 = 1.959964
"""The number of standard deviations on either side of the mean that contain 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of a model."""

    text: str
    """Without its stop token and without special tokens."""
    stopped: bool
    """It ended by a stop token."""
    num_tokens: int
    """The number of generated tokens, the stop token among them."""


def load_for_generation(folder: str | Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load model and tokenizer of a folder or hub id, in the stored dtype, on the GPU when there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[Message]],
    max_new_tokens: int = 256,
    batch_size: int = 32,
    template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """Generate the greedy reply to each prompt: a question, or the messages of a conversation so far.

    Raises: DataError when the tokenizer has no chat template.
    """
    texts = [render_prompt(tokenizer, prompt, template_kwargs) for prompt in prompts]
    return [reply.text for reply in generate_replies(model, tokenizer, texts, max_new_tokens, batch_size)]


def render_prompt(
    tokenizer: Any,
    prompt: str | list[Message],
    template_kwargs: dict[str, Any] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Render the text that the model continues: by the tokenizer's chat template, with a generation prompt.

    Raises: DataError when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so a prompt cannot be rendered",
            fix="set tokenizer.chat_template, or use a folder that this trainer wrote: it keeps the template",
        )

    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]

    text: str = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
    )
    return text


def generate_replies(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    tell: Callable[[int], object] = ignore,
) -> list[Reply]:
    """Generate greedy replies to rendered prompts, in their order. `tell` is called with the number of those done.

    Raises: ModelError when no token is known to end a reply.
    """
    stops = stop_ids(model.generation_config, tokenizer)

    # The longest first: memory runs out in the first batch, if at all, and batches need little padding.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _generate_batch(model, tokenizer, [texts[i] for i in chosen], max_new_tokens, stops)
        replies |= dict(zip(chosen, batch, strict=True))
        tell(len(replies))
    return [replies[i] for i in range(len(texts))]


def stop_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a reply: the generation config's ids where it names any, else the tokenizer's.

    Raises: ModelError when neither names one.
    """
    ids = generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id

    if ids is None:
        raise ModelError(
            "no token is known to end a reply",
            expected="eos_token_id in generation_config.json, or an eos_token of the tokenizer",
        )
    return set(ids) if isinstance(ids, list) else {ids}


def reply_of(tokenizer: Any, ids: Sequence[int], stops: set[int]) -> Reply:
    """Decode generated tokens up to the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Reply(text, end < len(ids), min(end + 1, len(ids)))


def final_answer(text: str) -> str | None:
    """Return the last final answer in `text`, normalised: the text after `####` on its line, or in `\\boxed{…}`.

    None when there is neither.
    """
    marker = text.rfind(MARKER)
    box = next(iter(reversed(list(BOX.finditer(text)))), None)
    if marker < 0 and box is None:
        return None

    if box is not None and box.start() > marker:
        if box["bare"] is not None:
            return _normalise(box["bare"])
        rest = text[box.end() :]
        inside = braced(rest)
        # A reply that was cut off has no closing brace: the answer is all that there is.
        return _normalise(rest if inside is None else inside)

    rest = text[marker + len(MARKER) :].strip()
    return _normalise(rest.split("\n", 1)[0])


def true_answer(truth: str) -> str:
    """Return the normalised answer in a truth, which is a final answer itself or a text that contains one."""
    found = final_answer(truth)
    return _normalise(truth) if found is None else found


def is_right(answer: str, truth: str) -> bool:
    """Return whether the final answer in `answer` is the one of `truth`. Without a final answer it is wrong."""
    return final_answer(answer) == true_answer(truth)


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Return the share of answers that are right."""
    assert len(answers) == len(truths) > 0
    right = [is_right(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    return right.count(True) / len(truths)


def interval(successes: int, total: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    share = successes / total
    per_row = Z95**2 / total
    middle = (share + per_row / 2) / (1 + per_row)
    half = Z95 * math.sqrt(share * (1 - share) / total + per_row / (4 * total)) / (1 + per_row)
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def _generate_batch(model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int, stops: set[int]) -> list[Reply]:
    # Any token can be the padding, since the mask hides it.
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = min(stops)

    # On the left, so that every reply begins at the same position.
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(len(row) for row in rows)
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)

    # Complete, since defaults of the model's own config, such as a repetition penalty, would change the replies.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    output = model.generate(inputs, attention_mask=mask, generation_config=greedy)
    return [reply_of(tokenizer, ids, stops) for ids in output[:, width:].tolist()]


def _normalise(answer: str) -> str:
    """Remove spaces, thousands separators, dollar signs and a full stop at the end: `$1,234.` is `1234`.

    Source: what GSM8K evaluations ignore.
    """
    bare = "".join(answer.split()).replace("\\$", "").replace("$", "").removesuffix(".")
    return THOUSANDS.sub("", bare)
