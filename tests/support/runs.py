"""Whole runs of a tiny model on a few words: the inputs, the arguments, and what a run leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apollo_sft.config.compose import compose
from apollo_sft.train.run import train
from tests.support import python
from tests.support.data import tiny_tokenizer, write_parquet
from tests.support.models import save_tiny_model, tiny_config

TIMEOUT_SECONDS = 240
OF_THE_CLOCK = {
    "train/tokens_per_second",
    "train/step_seconds",
    "memory/peak_bytes",
    "perf/data_wait_seconds",
    "perf/mfu",
}
"""Metrics that no two runs share."""

NUMBERS = ["one", "two", "three", "four", "five", "six"]


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of one to six words, and answers of one to six."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(NUMBERS, rng.integers(1, 7))) for _ in range(2 * number)]
    return [{"question": texts[2 * i], "answer": texts[2 * i + 1]} for i in range(number)]


def write_inputs(folder: Path, **changes: Any) -> Path:
    """A model with its tokenizer, 40 training rows, 7 validation rows. `changes`: of the model's config."""
    save_tiny_model(folder / "model", tiny_config(**({"vocab_size": 360} | changes)))
    tiny_tokenizer().save_pretrained(folder / "model")
    write_parquet(folder / "train.parquet", rows(40))
    write_parquet(folder / "val.parquet", rows(7, seed=1))
    return folder


def arguments(inputs: Path, out: Path, *more: str) -> list[str]:
    """Five steps an epoch, four epochs. `more` overrides."""
    keys = {
        "data.train_files": inputs / "train.parquet",
        "data.val_files": inputs / "val.parquet",
        "data.train_batch_size": 8,
        "data.micro_batch_size_per_gpu": 4,
        "data.max_length": 128,
        "data.store_dir": inputs / "store",
        "model.partial_pretrain": inputs / "model",
        "optim.lr": 1e-2,
        "trainer.device": "cpu",
        "trainer.logger": "[file]",
        "trainer.default_local_dir": out,
    }
    changed = {key: value for key, _, value in (text.partition("=") for text in more)}
    return [f"{key}={value}" for key, value in (keys | changed).items()]


def train_here(inputs: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """One run in this process; its metrics."""
    composed = compose(arguments(inputs, out, *more))
    train(composed.config, composed.overridden, composed.notes)
    return read_metrics(out)


def start(inputs: Path, out: Path, *more: str, processes: int = 1) -> "subprocess.Popen[str]":
    """The same from the command line."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "apollo_sft", *arguments(inputs, out, *more)]
    return python.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for it; what it wrote to stderr."""
    try:
        return process.communicate(timeout=TIMEOUT_SECONDS)[1]
    finally:
        process.kill()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def status(out: Path) -> str:
    return str(json.loads((out / "run.json").read_text())["status"])


def series(metrics: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in metrics if name in record]


def without_clock(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in OF_THE_CLOCK} for record in metrics]
