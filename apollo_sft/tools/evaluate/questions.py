"""Read questions with known answers from parquet files, and let a model folder answer them.

Single process; training does not come here.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apollo_sft.checkpoint.run_folder.lookup import find_run, read_training
from apollo_sft.config.compose import Composed
from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.conversation import needed_columns, parse_prompt, parse_row
from apollo_sft.data.read.files import Columns, Row
from apollo_sft.data.read.rows import read_rows
from apollo_sft.errors import ConfigError, DataError
from apollo_sft.model.generate import (
    Reply,
    final_answer,
    generate_replies,
    is_right,
    load_for_generation,
    render_prompt,
    stop_ids,
    true_answer,
)
from apollo_sft.types import Message, RowRef, ignore

REWARD = "reward_model"
"""The column of RL data whose `ground_truth` is the answer."""
Engine = Callable[[list[str], Callable[[int], object]], list[Reply]]
"""Takes rendered prompts, and a function that receives how many are done; returns replies in the same order."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one row."""

    ref: RowRef

    messages: list[Message]
    """The messages before the answer."""

    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]

    truth: str
    """The true final answer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How questions are answered."""

    max_new_tokens: int = 512
    batch_size: int = 32

    engine: str = "auto"
    """auto, transformers or vllm."""

    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """The arguments that training gave the template."""

    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, and the reply of the model."""

    question: Question

    prompt: str
    """The text that the model continued."""

    reply: Reply

    @property
    def right(self) -> bool:
        """Return whether the final answer is the true one."""
        return is_right(self.reply.text, self.question.truth)

    def record(self) -> dict[str, Any]:
        """Return the line of the file of generations."""
        return {
            "row": self.question.ref.row,
            "file": self.question.ref.file,
            "prompt": self.prompt,
            "answer": self.reply.text,
            "extracted": final_answer(self.reply.text),
            "truth": self.question.truth,
            "right": self.right,
            "stopped": self.reply.stopped,
            "tokens": self.reply.num_tokens,
        }


@dataclass(frozen=True, slots=True)
class Exam:
    """All questions with their replies."""

    answered: list[Answered]

    seconds: float
    """The time of generating alone."""

    engine: str

    @property
    def num_right(self) -> int:
        """Return how many replies are right."""
        return sum(one.right for one in self.answered)

    @property
    def num_stopped(self) -> int:
        """Return how many replies end with a stop token."""
        return sum(one.reply.stopped for one in self.answered)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all replies."""
        return sum(one.reply.num_tokens for one in self.answered)


def data_keys(folder: Path, composed: Composed) -> DataConfig:
    """Return the data section of the run that wrote `folder`, changed by the keys of the command line."""
    run = find_run(folder)
    if run is None:
        return composed.config.data

    tree = read_training(run)[0].model_dump()
    given = composed.config.data.model_dump()
    for key in composed.overridden:
        section, _, name = key.partition(".")
        if name in ("train_files", "val_files"):  # set by the command itself, and no files of the run
            continue
        if section == "data" and name.startswith("multiturn."):
            field = name.removeprefix("multiturn.")
            tree["multiturn"][field] = given["multiturn"][field]
        elif section == "data":
            top = name.partition(".")[0]
            tree[top] = given[top]

    return DataConfig.model_validate(tree)


def fitting_keys(data: DataConfig, columns: Sequence[str]) -> DataConfig:
    """Return `data` where its columns exist; else with keys for the usual columns.

    These are `prompt` of RL data, `extra_info`, `question`, `messages`. Without any of them `data` is returned as it
    is: the error of reading then names what is missing.
    """
    wanted = data.prompt_key
    if data.multiturn.enable:
        wanted = data.multiturn.messages_key
    if wanted in columns:
        return data

    single = data.multiturn.model_copy(update={"enable": False})
    changes: dict[str, dict[str, Any]] = {
        "prompt": {"prompt_key": "prompt", "multiturn": single},
        "extra_info": {"prompt_key": "extra_info", "response_key": "extra_info", "multiturn": single},
        "question": {"prompt_key": "question", "response_key": "answer", "multiturn": single},
        data.multiturn.messages_key: {"multiturn": data.multiturn.model_copy(update={"enable": True})},
    }
    name = next((name for name in changes if name in columns), None)
    if name is None:
        return data
    return data.model_copy(update=changes[name])


def read_questions(files: Sequence[str], data: DataConfig, max_rows: int = -1) -> list[Question]:
    """Read the questions of all rows, at most `max_rows` (-1: all), by the keys of a training.

    The truth is `reward_model.ground_truth` where the row has one, else the final answer in the response. A
    conversation asks for the last reply of the assistant.
    Raises: DataError for a file or a row that holds no question or no answer.
    """
    needed = needed_columns(data)
    required = needed.required
    optional = (*needed.optional, REWARD)
    if not data.multiturn.enable:
        # The response is not required: the reward's column may hold the truth.
        required = (data.prompt_key,)
        optional = (*optional, data.response_key)

    columns = Columns(required, optional, needed.keys)
    questions = [_question(row, ref, data) for ref, row in read_rows(files, columns, max_rows)]
    if not questions:
        raise DataError("there is no question to ask", found=f"no row in {', '.join(files)}")
    return questions


def take_exam(
    folder: str, questions: Sequence[Question], settings: Settings, progress: Callable[[int], object] = ignore
) -> Exam:
    """Render every question by the folder's own template, and generate greedy replies.

    `progress` is called with the number of questions that are done. Raises: ConfigError when there is no such engine.
    """
    name = chosen_engine(settings.engine)
    start = _transformers
    if name == "vllm":
        start = _vllm

    tokenizer, engine = start(folder, settings)

    kwargs = settings.template_kwargs
    prompts = [render_prompt(tokenizer, q.messages, kwargs | q.template_kwargs, q.tools) for q in questions]
    # The clock starts here: loading the model and rendering are no part of the speed.
    started = time.monotonic()
    replies = engine(prompts, progress)
    seconds = time.monotonic() - started
    return Exam(list(map(Answered, questions, prompts, replies)), seconds, name)


def chosen_engine(wanted: str) -> str:
    """Return the engine: `auto` is vLLM where it is installed and there is a GPU. Raises: ConfigError."""
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise ConfigError("--engine vllm: vLLM is not installed", fix="--engine transformers, or install vllm")
    if wanted == "auto":
        wanted = "transformers"
        if installed and torch.cuda.is_available():
            wanted = "vllm"

    return wanted


def _transformers(folder: str, settings: Settings) -> tuple[Any, Engine]:
    model, tokenizer = load_for_generation(folder, settings.trust_remote_code)

    def engine(prompts: list[str], progress: Callable[[int], object]) -> list[Reply]:
        return generate_replies(model, tokenizer, prompts, settings.max_new_tokens, settings.batch_size, progress)

    return tokenizer, engine


def _vllm(folder: str, settings: Settings) -> tuple[Any, Engine]:
    """Start vLLM. It gets token ids: before a text it would put a BOS of its own."""
    from transformers import AutoTokenizer, GenerationConfig
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    stops = stop_ids(GenerationConfig.from_pretrained(folder), tokenizer)
    greedy = SamplingParams(temperature=0.0, max_tokens=settings.max_new_tokens, stop_token_ids=sorted(stops))
    model = LLM(model=folder, trust_remote_code=settings.trust_remote_code)

    def engine(prompts: list[str], progress: Callable[[int], object]) -> list[Reply]:
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        outputs = model.generate([{"prompt_token_ids": row} for row in ids], greedy)
        progress(len(outputs))
        replies = [output.outputs[0] for output in outputs]
        return [Reply(one.text, one.finish_reason == "stop", len(one.token_ids)) for one in replies]

    return tokenizer, engine


def _question(row: Row, ref: RowRef, data: DataConfig) -> Question:
    if data.multiturn.enable:
        conversation = parse_row(row, ref, data)
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        truth = _truth(row, ref, messages[last]["content"])
        return Question(ref, messages[:last], conversation.tools, conversation.template_kwargs, truth)

    messages = parse_prompt(row, ref, data)
    response = None
    if row.get(REWARD) is None and data.response_key in row:
        response = parse_row(row, ref, data).messages[-1]["content"]
    return Question(ref, messages, None, {}, _truth(row, ref, response))


def _truth(row: Row, ref: RowRef, response: str | None) -> str:
    """Return the true final answer of a row. Raises: DataError when it has none."""
    truth = response
    reward = row.get(REWARD)
    if isinstance(reward, dict) and reward.get("ground_truth") is not None:
        truth = str(reward["ground_truth"])
    if truth is None or not true_answer(truth):
        raise DataError(
            f"{ref} has no answer to compare with",
            expected="reward_model.ground_truth, or a response that ends in #### or \\boxed{…}",
            fix="data.response_key (and data.response_dict_keys) name the column of the answers",
        )

    return true_answer(truth)
