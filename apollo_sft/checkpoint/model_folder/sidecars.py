"""The files beside the weights of a model folder: the base's own, and what training changed in them."""

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
"""The keys of config.json for the dtype of the weights: of transformers 5, and of 4."""


def copy_files(folder: Path, base: BaseModel, names: Iterable[str]) -> None:
    """Copy files of the base, by their paths in its folder. Raises: BaseFilesError when one can no longer be read."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = base.folder / name

        # Opening is tried on its own: an error while copying may be the disk that is written to.
        try:
            opened = source.open("rb")
        except OSError as error:
            raise base_is_gone(source) from error

        with opened, target.open("wb") as written:
            shutil.copyfileobj(opened, written)


def base_is_gone(path: Path) -> BaseFilesError:
    """Build the error for a file of the base that was there when the run began and can no longer be read."""
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
    if stop_token_ids and own is not None and not set(_as_list(own)) & set(stop_token_ids):
        config["eos_token_id"] = stop_token_ids[0]

    change_json(folder / CONFIG, _with_dtype(config, base, main_dtype(tensors)))


def _as_list(token_ids: Any) -> list[Any]:
    """Return the end tokens of a config as a list: they may be one number, a list, or None."""
    return token_ids if isinstance(token_ids, list) else [token_ids]


def _with_dtype(config: dict[str, Any], base: BaseModel, dtype: str) -> dict[str, Any]:
    """Return the config with the dtype wherever the base states one, also in the configs of its parts.

    It is added where the base states none and its files have another dtype.
    """
    stated = {key: dtype for key in DTYPE_KEYS if config.get(key) is not None}
    before = main_dtype(base.tensors) if base.tensors else dtype
    if dtype == before:
        return config | stated

    if not stated:
        stated = {"torch_dtype": dtype}  # every version of transformers reads this key

    parts = {}
    for key, part in config.items():
        if isinstance(part, dict):
            parts[key] = part | {name: dtype for name in DTYPE_KEYS if part.get(name) == before}

    return config | parts | stated


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Read the dtype that a config.json states; None when it states none."""
    for key in DTYPE_KEYS:
        if config.get(key) is not None:
            return str(config[key])
    return None


def main_dtype(tensors: Mapping[str, TensorSpec]) -> str:
    """Return the floating dtype of most of the numbers in the files, as transformers spells it; float32 for none."""
    counts: Counter[str] = Counter()
    for spec in tensors.values():
        if spec.dtype in DTYPES and DTYPES[spec.dtype].is_floating_point:
            counts[spec.dtype] += math.prod(spec.shape)

    most = counts.most_common(1)[0][0] if counts else "F32"
    return str(DTYPES[most]).removeprefix("torch.")


def write_generation_config(folder: Path, base: BaseModel, stop_token_ids: Sequence[int]) -> None:
    """Make generation_config.json list the trained stop tokens as end tokens, then the base's own.

    A file of the base that lists them already stays as it is. Where the base has no such file, one is written with the
    token ids of its config.json.
    """
    path = base.folder / GENERATION
    if path.is_file():
        config = read_json(path)
    else:
        config = {key: base.config[key] for key in TOKEN_IDS if base.config.get(key) not in (None, -1)}

    own = config.get("eos_token_id")
    if not path.is_file() or not set(stop_token_ids) <= set(_as_list(own)):
        ids = end_tokens(base, stop_token_ids)
        if ids:
            config["eos_token_id"] = ids if len(ids) > 1 else ids[0]

    change_json(folder / GENERATION, config)


def end_tokens(base: BaseModel, stop_token_ids: Iterable[int]) -> list[int]:
    """List the end tokens of the exported model: what was trained as a stop token, then the base's own."""
    path = base.folder / GENERATION
    own = None
    if path.is_file():
        own = read_json(path).get("eos_token_id")

    if own in (None, -1):
        own = base.config.get("eos_token_id")

    mine = [token for token in _as_list(own) if token not in (None, -1)]
    return list(dict.fromkeys([*stop_token_ids, *mine]))
