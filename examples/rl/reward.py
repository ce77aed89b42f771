"""The reward of GSM8K, and the mean reward of a model folder on held-out questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import GenerationConfig

from apollo_sft.model.generate import generate_answers, is_right, load_for_generation, reply_of, stop_ids

MAX_ANSWER_TOKENS = 40
QUESTIONS_AT_ONCE = 100


def reward(completions: Sequence[Any], reward_model: Sequence[dict[str, str]], **_: object) -> list[float]:
    """1 where the final answer is the row's `reward_model.ground_truth`, else 0: a reward function for TRL.

    TRL hands over each completion as messages of the assistant, and the columns of the data by name.
    """
    texts = ["".join(message["content"] for message in completion) for completion in completions]
    return [float(is_right(text, row["ground_truth"])) for text, row in zip(texts, reward_model, strict=True)]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean reward of each held-out question: of its greedy answer, and of answers sampled at temperature 1."""

    greedy: list[float]
    sampled: list[float]


@dataclass(frozen=True, slots=True)
class Rise:
    """Mean reward over the same questions before and after. `error`: the standard error of the mean difference."""

    num_questions: int
    before: float
    after: float
    difference: float
    error: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Rise:
        differences = [b - a for a, b in zip(before, after, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences))
        return cls(len(differences), fmean(before), fmean(after), fmean(differences), error)

    def exceeds_noise(self, num_errors: float) -> bool:
        return self.difference > num_errors * self.error

    def record(self) -> dict[str, float]:
        return asdict(self)


def score(folder: Path, rows: Sequence[dict[str, Any]], num_samples: int, seed: int) -> Score:
    """Open the folder by its path and answer the `prompt` of each row, greedily and `num_samples` times at random."""
    model, tokenizer = load_for_generation(folder)
    prompts = [row["prompt"] for row in rows]
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    greedy = generate_answers(model, tokenizer, prompts, MAX_ANSWER_TOKENS, QUESTIONS_AT_ONCE)
    texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    sampled: list[float] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(texts), QUESTIONS_AT_ONCE):
            few = slice(start, start + QUESTIONS_AT_ONCE)
            for truth, answers in zip(truths[few], _sample(model, tokenizer, texts[few], num_samples), strict=True):
                sampled.append(fmean(is_right(answer, truth) for answer in answers))
    return Score([float(is_right(answer, truth)) for answer, truth in zip(greedy, truths, strict=True)], sampled)


@torch.no_grad()
def _sample(model: Any, tokenizer: Any, texts: list[str], number: int) -> list[list[str]]:
    """`number` answers to each text, from the model's own distribution."""
    stops = stop_ids(model.generation_config, tokenizer)
    inputs = tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    ).to(model.device)
    config = GenerationConfig(
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=number,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    output = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    replies = [reply_of(tokenizer, ids, stops).text for ids in output]
    return [replies[start : start + number] for start in range(0, len(replies), number)]
