"""Make the training command for prepared files, ready to paste."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

DEFAULT_BATCH = 256
DEFAULT_LENGTH = 1024
LONGEST = 8192
BYTES_PER_TOKEN = 2
TEMPLATE_TOKENS = 64
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def training_keys(files: Mapping[str, Path], largest: int) -> list[str]:
    """Return the keys of a training on these files: `train`, or the first, is trained; the next, if any, is held out.

    `largest`: bytes of text in the largest row.
    """
    train = files.get("train") or next(iter(files.values()))
    others = [file for file in files.values() if file != train]
    parquet = pq.ParquetFile(train)
    keys = [f"data.train_files={train}"]
    if others:
        keys.append(f"data.val_files={others[0]}")
    else:
        keys.append("data.val_files=null")
    if "messages" in parquet.schema_arrow.names:
        keys += ["data.multiturn.enable=true", "data.multiturn.messages_key=messages"]
    else:
        keys += ["data.prompt_key=question", "data.response_key=answer"]

    keys += _length_keys(largest)
    # A small file gets a batch that it can fill: the largest power of two.
    rows = parquet.metadata.num_rows
    if rows < DEFAULT_BATCH:
        keys.append(f"data.train_batch_size={1 << (rows.bit_length() - 1)}")
    return [*keys, f"model.partial_pretrain={MODEL}", "trainer.default_local_dir=sft-model"]


def _length_keys(largest: int) -> list[str]:
    """Return keys with room for the largest row: a token of math or code has two bytes or more.

    Rows beyond the limit are dropped.
    """
    length = DEFAULT_LENGTH
    while length < LONGEST and largest / BYTES_PER_TOKEN + TEMPLATE_TOKENS > length:
        length *= 2

    keys = []
    if length > DEFAULT_LENGTH:
        keys.append(f"data.max_length={length}")
    if largest / BYTES_PER_TOKEN + TEMPLATE_TOKENS > length:
        keys.append("data.truncation=drop")
    return keys


def commands(keys: list[str]) -> str:
    """Return the command with `apollo-sft train`, and the one with torchrun and the same keys."""
    words = " \\\n    ".join(shlex.quote(key) for key in keys)
    torchrun = "torchrun --standalone --nnodes=1 --nproc_per_node=2 -m apollo_sft"
    return f"apollo-sft train \\\n    {words}\n\nThe same by torchrun:\n\n{torchrun} \\\n    {words}\n"
