"""The training command that fits what was prepared: printed, ready to paste."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

DEFAULT_BATCH = 256
DEFAULT_LENGTH = 1024
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def training_keys(files: Mapping[str, Path]) -> list[str]:
    """The keys of a training on these files: the first split is trained, the second, if any, is held out."""
    train, *others = files.values()
    parquet = pq.ParquetFile(train)
    keys = [f"data.train_files={train}", f"data.val_files={others[0] if others else 'null'}"]
    if "messages" in parquet.schema_arrow.names:
        keys += ["data.multiturn.enable=true", "data.multiturn.messages_key=messages", "data.max_length=2048"]
    else:
        keys += ["data.prompt_key=question", "data.response_key=answer"]
    rows = parquet.metadata.num_rows
    if rows < DEFAULT_BATCH:
        keys.append(f"data.train_batch_size={1 << (rows.bit_length() - 1)}")
    return [*keys, f"model.partial_pretrain={MODEL}", "trainer.default_local_dir=sft-model"]


def commands(keys: list[str]) -> str:
    """The command with `apollo-sft train`, and how torchrun is called with the same keys."""
    words = " \\\n    ".join(shlex.quote(key) for key in keys)
    torchrun = "torchrun --standalone --nnodes=1 --nproc_per_node=2 -m apollo_sft"
    return f"apollo-sft train \\\n    {words}\n\nThe same by torchrun:\n\n{torchrun} \\\n    {words}\n"
