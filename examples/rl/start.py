"""What GRPO starts from: word problems, a model that SFT was stopped early on, and what SFT trained."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from apollo_sft.checkpoint.run_folder.lookup import find_run, read_config
from apollo_sft.cli.demo import Demo, training_command
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import ConfigError, DataError, ModelError
from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import write_word_problems
from apollo_sft.train.prepare_run import prepare
from apollo_sft.types import IGNORE_INDEX

LARGEST = 10
"""Problems of one step with numbers up to this: few enough sums that some thousand answers meet each many times."""
NUM_DRAWN = 40_000, 3_000
"""Training and held-out problems to choose from. One in five or so has one step and small numbers."""
NUM_TRAIN = 6_000
COLUMNS = ("prompt", "reward_model")
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of parquet files, and of each the token ids before its first target, as SFT trained it."""

    rows: list[dict[str, Any]]
    prompts: list[Ids]


@dataclass(frozen=True, slots=True)
class SftRun:
    train: Split
    held_out: Split


def train_stopped_early(demo: Demo, num_held_out: int) -> None:
    """Write problems and an untrained model, and train it by the command of `apollo-sft demo`.

    Held-out questions are in no training file. Raises: DataError, ModelError.
    """
    write_word_problems(demo.folder / "data", *NUM_DRAWN, demo.seed)
    texts: list[str] = []
    for split, number in (("train", NUM_TRAIN), ("test", num_held_out)):
        path = demo.data("single_turn", split)
        rows = [row for row in pq.read_table(path).to_pylist() if _is_small(row["extra_info"]["answer"])][:number]
        if len(rows) < min(number, num_held_out):
            raise DataError(
                "--held-out is more than there is", found=str(num_held_out), expected=f"at most {len(rows)}"
            )
        pq.write_table(pa.Table.from_pylist(rows), path)
        texts += [row["extra_info"][key] for row in rows for key in ("question", "answer") if split == "train"]
    write_base_model(demo.base_model, texts, demo.seed)
    command = training_command(demo, "single_turn")
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise ModelError(f"the training ended with exit code {code}", fix="its own message is above")


def read_sft_run(folder: Path, num_held_out: int) -> SftRun:
    """Data and prompts of the run that left `folder`, from its config.yaml, and the check that RL has the same prompts.

    Raises: ConfigError for a folder that no run left, or a run without validation data; DataError for a row that RL
    would render otherwise, or that has no `prompt` or `reward_model`.
    """
    run = find_run(folder)
    if run is None:
        raise ConfigError(f"{folder} was not left by a training", expected="the output folder of apollo-sft train")
    prepared = prepare(read_config(run))
    if prepared.val is None:
        raise ConfigError(f"the run of {folder} had no data.val_files to evaluate on")
    train, held_out = (_split(store, limit) for store, limit in ((prepared.train, None), (prepared.val, num_held_out)))
    for split in (train, held_out):
        check_prompts(folder, split)
    return SftRun(train, held_out)


def check_prompts(folder: Path, split: Split) -> None:
    """Raises: DataError when the folder's tokenizer renders a `prompt` to other ids than those that SFT trained."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [row["prompt"] for row in split.rows]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    for i, (ours, theirs) in enumerate(zip(split.prompts, rendered, strict=True)):
        if ours != tuple(theirs):
            raise DataError(
                f"question {i}: RL has another prompt than SFT",
                found=repr(tokenizer.decode(theirs)),
                expected=repr(tokenizer.decode(ours)),
                fix="prepare both from one file: apollo-sft prepare gsm8k",
            )


def _split(store: SampleStore, limit: int | None) -> Split:
    number = len(store) if limit is None else min(limit, len(store))
    refs = [store.ref(i) for i in range(number)]
    tables = {name: _read(name) for name in {ref.file for ref in refs}}
    return Split([tables[ref.file][ref.row] for ref in refs], [_prompt(store, i) for i in range(number)])


def _read(file: str) -> list[dict[str, Any]]:
    missing = [name for name in COLUMNS if name not in pq.read_schema(file).names]
    if missing:
        raise DataError(f"{file}: no column for RL", found=f"no {', '.join(missing)}", fix="apollo-sft prepare gsm8k")
    rows: list[dict[str, Any]] = pq.read_table(file, columns=list(COLUMNS)).to_pylist()
    return rows


def _prompt(store: SampleStore, i: int) -> Ids:
    ids, labels = store.tokens(i)
    first = int(np.argmax(labels != IGNORE_INDEX))  # labels[t] is what follows position t
    return tuple(ids[: first + 1].tolist())


def _is_small(answer: str) -> bool:
    return answer.count("\n") == 1 and max(int(number) for number in re.findall(r"\d+", answer)) <= LARGEST
