"""What lies beside the weights of a model folder: config, generation config, tokenizer, the model's own code."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.publish import read_json
from apollo_sft.checkpoint.tensor_files import DTYPES
from apollo_sft.types import BaseModel, TensorSpec

SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that transformers ignores, and refuses to save again, unless `do_sample` is true."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def write_config(
    folder: Path, base: BaseModel, class_name: str, tensors: Mapping[str, TensorSpec], stop_token_ids: Sequence[int]
) -> None:
    """config.json: the base's own, with the class that was trained and the dtype that the files really have.

    An end token that no trained turn ended with gives way to one that did.
    """
    config = _without_private(base.config)
    dtype = main_dtype(tensors)
    config["architectures"] = [class_name]
    config["dtype"] = dtype
    if "torch_dtype" in config:  # what older readers look at
        config["torch_dtype"] = dtype
    own = config.get("eos_token_id")
    if stop_token_ids and own is not None and not set(own if isinstance(own, list) else [own]) & set(stop_token_ids):
        config["eos_token_id"] = stop_token_ids[0]
    _write_json(folder / "config.json", config)


def main_dtype(tensors: Mapping[str, TensorSpec]) -> str:
    """The floating dtype of most of the numbers in the files, as transformers spells it; float32 when there is none."""
    counts: Counter[str] = Counter()
    for spec in tensors.values():
        if DTYPES[spec.dtype].is_floating_point:
            counts[spec.dtype] += math.prod(spec.shape)
    return str(DTYPES[counts.most_common(1)[0][0] if counts else "F32"]).removeprefix("torch.")


def _without_private(value: Any) -> Any:
    """A copy without keys that begin with `_`: they are paths and states of the process that wrote the base."""
    if isinstance(value, dict):
        return {key: _without_private(item) for key, item in value.items() if not str(key).startswith("_")}
    if isinstance(value, list):
        return [_without_private(item) for item in value]
    return value


def write_generation_config(folder: Path, base: BaseModel, stop_token_ids: Iterable[int]) -> None:
    """generation_config.json: the base's own, ending at what was trained as a stop token, then at the base's own.

    A base whose settings transformers would not save again keeps only its token ids.
    """
    path = base.folder / "generation_config.json"
    if path.is_file():
        config = _without_private(read_json(path))
    else:
        config = {key: base.config[key] for key in TOKEN_IDS if key in base.config}
    config = {key: value for key, value in config.items() if key not in TOKEN_IDS or value not in (None, -1)}
    if config.get("do_sample") is not True:
        config = {key: value for key, value in config.items() if key not in SAMPLING_FLAGS}
    ids = end_tokens(base, stop_token_ids)
    if ids:
        config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    if not _can_be_saved(config):
        config = {key: config[key] for key in TOKEN_IDS if key in config}
    _write_json(folder / "generation_config.json", config)


def end_tokens(base: BaseModel, stop_token_ids: Iterable[int]) -> list[int]:
    """What ends a reply of the exported model: what was trained as a stop token, then the base's own."""
    path = base.folder / "generation_config.json"
    own = read_json(path).get("eos_token_id") if path.is_file() else None
    own = base.config.get("eos_token_id") if own in (None, -1) else own
    mine = own if isinstance(own, list) else [own]
    return list(dict.fromkeys([*stop_token_ids, *(token for token in mine if token not in (None, -1))]))


def _can_be_saved(config: dict[str, Any]) -> bool:
    from transformers import GenerationConfig

    try:
        GenerationConfig(**config).validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def write_tokenizer(
    folder: Path, tokenizer: Any, chat_template: str | None, stop_token_ids: Sequence[int] = ()
) -> None:
    """The tokenizer's files with the chat template that was used; `None` leaves the tokenizer's own.

    Its end token becomes the one that ended the trained turns, where that is one and the template writes no end token
    by name: RL trainers look for the end of a reply by it.
    """
    written = copy.deepcopy(tokenizer)
    if chat_template is not None:
        written.chat_template = chat_template
    if len(stop_token_ids) == 1 and "eos_token" not in str(written.chat_template):
        written.eos_token = written.convert_ids_to_tokens(stop_token_ids[0])
    written.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    private = ("name_or_path", "special_tokens_map_file", "tokenizer_file", "is_local", "local_files_only")
    _write_json(path, {key: value for key, value in read_json(path).items() if key not in private})


def copy_code(folder: Path, base: BaseModel) -> None:
    """The Python files that `auto_map` names and what lies beside them, for models that bring their own code."""
    for path in sorted(base.folder.glob("*.py")):
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
