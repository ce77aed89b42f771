"""What lies beside the weights of a model folder: the base's own files, and what training changed in them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.model_folder.json_files import change_json
from apollo_sft.checkpoint.model_folder.tensor_files import DTYPES
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.errors import BaseFilesError
from apollo_sft.types import BaseModel, TensorSpec

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
DTYPE_KEYS = ("dtype", "torch_dtype")
"""How config.json names the dtype of the weights: transformers 5, and 4."""


def copy_files(folder: Path, base: BaseModel, names: Iterable[str]) -> None:
    """Copy files of the base, by their paths in its folder. Raises: BaseFilesError when one can no longer be read."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = base.folder / name
        try:
            opened = source.open("rb")
        except OSError as error:
            raise base_is_gone(source) from error
        with opened, target.open("wb") as written:
            shutil.copyfileobj(opened, written)


def base_is_gone(path: Path) -> BaseFilesError:
    """Say that a file of the base, which was there when the run began, can no longer be read."""
    return BaseFilesError(
        f"a file of the base model can no longer be read: {path}",
        expected="the base model where it was when the run began",
        fix="put it back; apollo-sft export RUN_FOLDER OUT then writes the model of a checkpoint",
    )


def write_config(
    folder: Path, base: BaseModel, class_name: str, tensors: Mapping[str, TensorSpec], stop_token_ids: Sequence[int]
) -> None:
    """Make config.json state the class that was trained and the dtype that the files have.

    An end token that no trained turn ended with gives way to one that did.
    """
    config = dict(base.config)
    config["architectures"] = [class_name]
    own = config.get("eos_token_id")
    if stop_token_ids and own is not None and not set(own if isinstance(own, list) else [own]) & set(stop_token_ids):
        config["eos_token_id"] = stop_token_ids[0]
    change_json(folder / CONFIG, _with_dtype(config, base, main_dtype(tensors)))


def _with_dtype(config: dict[str, Any], base: BaseModel, dtype: str) -> dict[str, Any]:
    """State the dtype where the base states one, in the configs of its parts too; anew, where the files have another
    one than the base's and it states none."""
    stated = {key: dtype for key in DTYPE_KEYS if config.get(key) is not None}
    before = main_dtype(base.tensors) if base.tensors else dtype
    if not stated and dtype != before:
        stated = {"torch_dtype": dtype}  # every version reads it

    parts = {
        key: part | {name: dtype for name in DTYPE_KEYS if part.get(name) == before}
        for key, part in config.items()
        if isinstance(part, dict) and dtype != before
    }
    return config | parts | stated


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Read the dtype that a config.json states; None when it states none."""
    return next((str(config[key]) for key in DTYPE_KEYS if config.get(key) is not None), None)


def main_dtype(tensors: Mapping[str, TensorSpec]) -> str:
    """Name the floating dtype of most of the numbers in the files, as transformers spells it; float32 for none."""
    counts: Counter[str] = Counter()
    for spec in tensors.values():
        if spec.dtype in DTYPES and DTYPES[spec.dtype].is_floating_point:
            counts[spec.dtype] += math.prod(spec.shape)
    return str(DTYPES[counts.most_common(1)[0][0] if counts else "F32"]).removeprefix("torch.")


def write_generation_config(folder: Path, base: BaseModel, stop_token_ids: Sequence[int]) -> None:
    """Make generation_config.json end replies at what was trained as a stop token, then at the base's own.

    Where the base ends them there already, it stays as it is; where it has none, its token ids are written.
    """
    path = base.folder / GENERATION
    if path.is_file():
        config = read_json(path)
    else:
        config = {key: base.config[key] for key in TOKEN_IDS if base.config.get(key) not in (None, -1)}
    own = config.get("eos_token_id")
    if not path.is_file() or not set(stop_token_ids) <= set(own if isinstance(own, list) else [own]):
        ids = end_tokens(base, stop_token_ids)
        if ids:
            config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    change_json(folder / GENERATION, config)


def end_tokens(base: BaseModel, stop_token_ids: Iterable[int]) -> list[int]:
    """List what ends a reply of the exported model: what was trained as a stop token, then the base's own."""
    path = base.folder / GENERATION
    own = read_json(path).get("eos_token_id") if path.is_file() else None
    own = base.config.get("eos_token_id") if own in (None, -1) else own
    mine = own if isinstance(own, list) else [own]
    return list(dict.fromkeys([*stop_token_ids, *(token for token in mine if token not in (None, -1))]))
