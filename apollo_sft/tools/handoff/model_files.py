"""What a model folder holds, against what verl, TRL and vLLM read of it: files, config, names, shapes, dtypes.

No weight is read. Training does not come here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.model_folder.conversion import CONFIG_DTYPES, follow_names, plan_export
from apollo_sft.checkpoint.model_folder.sidecars import main_dtype, stated_dtype
from apollo_sft.checkpoint.model_folder.tensor_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    read_tensors,
    safe_path,
    same_values,
    specs_of,
)
from apollo_sft.config.schema import DataConfig
from apollo_sft.errors import CheckpointError
from apollo_sft.model.load import in_short
from apollo_sft.train.base_model import WRAPPERS
from apollo_sft.types import BaseModel, TensorSpec

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PEFT_MARKS = ("lora_", ".base_layer.", "base_model.model.", ".modules_to_save.")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PREDICTED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Keys of config.json that count layers of multi-token prediction."""
LAYER = re.compile(r"\blayers\.(\d+)\.")
NAMED = 3
"""How many names a message lists."""


class WrongError(Exception):
    """What a check found. `name` is its own, as docs/handoff.md lists it; `is_note`: RL can work with it."""

    def __init__(self, name: str, what: str, fix: str, is_note: bool = False) -> None:
        super().__init__(what)
        self.name, self.what, self.fix, self.is_note = name, what, fix, is_note


@dataclass
class Subject:
    """A folder, how it is to be checked, and what the checks have opened so far, in their order.

    `data`: the keys by which rows are read and rendered. `run`: the one that wrote the folder; `base`: the folder
    of its base model, where that is on this machine; `of_base`: names of the base's tensors.
    `reader`: the version of transformers that is to open the folder, None where nothing was said.
    `files`: parquet files whose rows are rendered, () for none. `max_new_tokens`: None is twice the longest reply of
    these rows. `model`: of config.json, on meta. `prompts`: some that were rendered.
    """

    folder: Path
    data: DataConfig
    run: Path | None = None
    base: Path | None = None
    of_base: frozenset[str] = frozenset()
    files: tuple[str, ...] = ()
    trust_remote_code: bool = False
    generate: bool = True
    reader: tuple[int, int] | None = None
    max_new_tokens: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    hf_config: Any = None
    model: Any = None
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    tokenizer: Any = None
    prompts: list[str] = field(default_factory=list)
    longest_reply: int = 0

    @property
    def model_state(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers, on meta, by name."""
        state: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        return state


def is_copied(subject: Subject, name: str) -> bool:
    """Tell whether a tensor that the model does not hold may be in the files.

    It may where the base has it, where transformers passes it over for this class, or where it is of the layers of
    multi-token prediction that config.json counts.
    """
    passed_over = getattr(subject.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if name in subject.of_base or any(re.search(pattern, name) for pattern in passed_over):
        return True
    return counted_layers(subject.config) is not None and is_predicting(subject, name)


def counted_layers(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Find the key of config.json that counts layers of multi-token prediction, and their number."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next(((key, part[key]) for part in parts for key in PREDICTED if part.get(key)), None)


def is_predicting(subject: Subject, name: str) -> bool:
    """Tell whether a tensor is of a layer behind the last one, or of multi-token prediction by its name."""
    layer = LAYER.search(name)
    behind = layer is not None and int(layer[1]) >= getattr(subject.hf_config.get_text_config(), "num_hidden_layers", 0)
    return behind or "mtp" in name or "nextn" in name


def check_form(subject: Subject) -> str:
    """A model in safetensors: no pickle, and no adapter that somebody would have to merge."""
    names = _names(subject)
    if "adapter_config.json" in names:
        _check_adapter(subject, names)
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise WrongError(
            "pickle_weights",
            f"{some(pickles)}: opening a pickle can run code",
            "keep safetensors only; take the file out of the folder",
        )
    return "safetensors, no pickle, no adapter"


def _check_adapter(subject: Subject, names: set[str]) -> None:
    """Say what an adapter in the folder means. Raises: WrongError, always."""
    if "config.json" in names:
        raise WrongError(
            "adapter_beside_model",
            "an adapter lies beside the model: transformers adds it on top, RL and vLLM do not",
            "take adapter_config.json and adapter_model.safetensors away, unless they are to be merged",
        )
    base = str(_read(subject.folder / "adapter_config.json").get("base_model_name_or_path"))
    if base.startswith(".") or (base.count("/") != 1 and not Path(base).is_absolute()):
        raise WrongError(
            "adapter_base_unknown",
            f"the adapter names its base {base}, which is found from one folder only",
            "base_model_name_or_path in adapter_config.json: a hub id, or an absolute path",
        )
    if "tokenizer_config.json" not in names:
        raise WrongError(
            "adapter_without_tokenizer",
            "an adapter without the tokenizer and chat template that it was trained with",
            "copy the tokenizer files beside it; runs of ours write them",
        )
    raise WrongError(
        "adapter_only",
        "the folder holds an adapter, which RL and vLLM do not merge",
        "apollo-sft export RUN_FOLDER OUT merges it into its base",
    )


def check_files(subject: Subject) -> str:
    """The files that every reader asks for."""
    names = _names(subject)
    for name, wrong, fix in (
        ("config.json", "missing_config", "give the folder of a model; apollo-sft export RUN_FOLDER OUT writes one"),
        ("tokenizer_config.json", "missing_tokenizer", "copy the tokenizer's files of the base model here"),
        ("generation_config.json", "missing_generation_config", "export again: without it nothing states the stops"),
    ):
        if name not in names:
            raise WrongError(wrong, f"no {name}", fix)
    if not names & set(TOKENIZER_FILES):
        raise WrongError("missing_tokenizer", "no tokenizer.json", "copy the tokenizer's files of the base model here")
    _check_modes(subject)
    changed = _changed(subject.folder)
    if changed:
        what = f"changed since an export wrote them: {some(changed)}"
        raise WrongError("changed_files", what, "export again, unless somebody meant it", is_note=True)
    return "config, generation config, tokenizer"


def _check_modes(subject: Subject) -> None:
    """Who may read one file of the model may read all. Raises: WrongError."""
    modes = {path.name: path.stat().st_mode & 0o444 for path in subject.folder.iterdir() if path.is_file()}
    closed = sorted(name for name, mode in modes.items() if modes["config.json"] & ~mode)
    if closed:
        what = f"{some(closed)}: accounts that can read config.json cannot read them"
        raise WrongError("unreadable_files", what, f"chmod --reference=config.json {closed[0]}")


def check_config(subject: Subject) -> str:
    """config.json names an architecture that transformers registers; its model is built without memory."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    subject.config = _read(subject.folder / "config.json")
    if subject.config.get("auto_map") and not subject.trust_remote_code:
        raise WrongError(
            "own_code",
            "config.json has an auto_map: readers would run the folder's own code",
            "take auto_map out if transformers knows the model; else --trust-remote-code, here and in RL",
        )
    named = subject.config.get("architectures") or ["none"]
    known = hasattr(transformers, str(named[0])) or subject.trust_remote_code
    fix = "architectures must name one class of transformers, such as Qwen2ForCausalLM"
    if not known:
        raise WrongError("unknown_architecture", f"{named[0]} in config.json is no class of transformers", fix)
    try:
        trust = subject.trust_remote_code
        subject.hf_config = AutoConfig.from_pretrained(subject.folder, trust_remote_code=trust)
        with torch.device("meta"):
            subject.model = AutoModelForCausalLM.from_config(subject.hf_config, trust_remote_code=trust)
    except Exception as error:  # a foreign file in a library: it may raise anything
        raise WrongError("unknown_architecture", in_short(error), "config.json must describe a causal model") from error
    if type(subject.model).__name__ != named[0] and not subject.trust_remote_code:
        raise WrongError(
            "unknown_architecture", f"{named[0]}, but transformers opens {type(subject.model).__name__}", fix
        )
    return str(named[0])


def check_weights(subject: Subject) -> str:
    """Index and shards fit one another, and every file lies in the folder and is whole."""
    folder = subject.folder
    shards = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if not shards:
        raise WrongError("missing_weights", f"no {SINGLE_FILE} and no shards", "export the model again")
    wanted = {SINGLE_FILE}
    if not (folder / SINGLE_FILE).is_file():
        if not (folder / INDEX_FILE).is_file():
            raise WrongError("missing_index", f"{some(shards)} without {INDEX_FILE}", "export the model again")
        weight_map = _read(folder / INDEX_FILE).get("weight_map")
        wanted = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        for name in sorted(map(str, wanted)):
            if Path(name).name != name:
                raise WrongError(
                    "file_outside", f"{INDEX_FILE} names {name}", "every shard must lie in the folder itself"
                )
            if not (folder / name).exists():
                raise WrongError(
                    "missing_shard", f"{INDEX_FILE} names {name}, which is not there", "copy the whole folder"
                )
    try:
        for name in wanted:
            safe_path(folder, name)
    except CheckpointError as error:
        raise WrongError("file_outside", str(error).splitlines()[0], "copy the file itself into the folder") from error
    try:
        subject.tensors = specs_of(read_tensors(folder))
    except CheckpointError as error:
        named = "index_differs" if str(error).startswith(str(folder / INDEX_FILE)) else "damaged_weights"
        raise WrongError(named, _line(error), "copy or export the folder again") from error
    stray = sorted(set(shards) - wanted)
    if stray:
        raise WrongError(
            "stray_weights", f"{some(stray)}: no part of the model, but some readers load them", "remove them"
        )
    return f"{len(subject.tensors)} tensors in {len(wanted)} file{'s' * (len(wanted) > 1)}"


def check_names(subject: Subject) -> str:
    """Every tensor has a name and a shape that the architecture's own model takes, and none is missing."""
    model, held = subject.model, subject.tensors
    adapted = [name for name in held if any(mark in name for mark in PEFT_MARKS)]
    wrapped = [name for name in held if name.startswith(tuple(WRAPPERS)) and name not in adapted]
    if wrapped:
        raise WrongError(
            "wrapped_names",
            f"{some(wrapped)}: saved from a wrapper of the model, so no reader finds them",
            "save the model that lies inside of the wrapper, or take what it adds out of the names",
        )
    if adapted:
        raise WrongError("peft_names", some(adapted), "merge the adapter: apollo-sft export does")
    state = subject.model_state
    read = follow_names(model, held)
    unknown = [name for name in held if read[name][0] not in state and not is_copied(subject, name)]
    if unknown:
        raise WrongError(
            "unexpected_tensors",
            f"{len(unknown)} that {type(model).__name__} does not hold: {some(unknown)}",
            "names must be those of the base model's own files",
        )
    used = [name for name in held if read[name][0] in state]
    _check_tied({n: id(state[read[n][0]]) for n in used if not read[n][1]}, read_tensors(subject.folder))
    covered = {id(state[read[name][0]]) for name in used}
    missing = [name for name, _ in model.named_parameters() if id(state[name]) not in covered]
    if missing:
        raise WrongError("missing_tensors", f"{len(missing)}: {some(missing)}", "export or copy the whole model")
    for name in used:
        memory, is_converted = read[name]
        if not is_converted and held[name].shape != tuple(state[memory].shape):
            found = f"{name} is {held[name].shape}, and {tuple(state[memory].shape)} by config.json"
            raise WrongError("shape_differs", found, "config.json and weights must be of one model")
    try:
        plan_export(model, BaseModel(str(subject.folder), subject.folder, subject.config, held), "auto")
    except (CheckpointError, RuntimeError, ValueError, KeyError) as error:  # of what is fused while it is loaded
        is_absent = isinstance(error, CheckpointError) and "shape" not in str(error)
        name = "missing_tensors" if is_absent else "shape_differs"
        raise WrongError(name, _line(error), "config.json and weights must be of one model") from error
    return f"all that {type(model).__name__} takes, and nothing else"


def check_dtype(subject: Subject) -> str:
    """What config.json says of the dtype is what the files have."""
    found = main_dtype(subject.tensors)
    if stated_dtype(subject.config) is None:
        what = f"config.json states no dtype; the files have {found}"
        raise WrongError("dtype_not_stated", what, f'"torch_dtype": "{found}"', is_note=True)
    for key in ("dtype", "torch_dtype"):
        stated = subject.config.get(key) or found
        if stated != found:
            raise WrongError("dtype_differs", f"{stated} in config.json, {found} in the files", f'"{key}": "{found}"')
    others = {spec.dtype for spec in subject.tensors.values()} - {CONFIG_DTYPES.get(found, found)}
    return found + (f" (and {', '.join(sorted(others))})" if others else "")


def _names(subject: Subject) -> set[str]:
    return {path.name for path in subject.folder.iterdir() if path.is_file()}


def _changed(folder: Path) -> list[str]:
    """Files that are not what was written, by the list that lies beside them; of weights the size alone is compared."""
    in_checkpoint = folder / ".." / publish.DIRECTORY_MANIFEST
    manifest, above = (
        (folder / publish.MANIFEST, "") if (folder / publish.MANIFEST).is_file() else (in_checkpoint, "hf/")
    )
    listed = _read(manifest).get("files", {}) if manifest.is_file() else {}
    changed = []
    for name, facts in sorted(listed.items()):
        path = folder / str(name).removeprefix(above)
        if not str(name).startswith(above) or not path.is_file():
            continue
        same_size = path.stat().st_size == facts["size"]
        if not same_size or (path.suffix != ".safetensors" and publish.describe_file(path) != facts):
            changed.append(path.name)
    return changed


def _check_tied(parameter_of: dict[str, int], stored: Mapping[str, StoredTensor]) -> None:
    first: dict[int, str] = {}
    for name, parameter in parameter_of.items():
        if parameter not in first:
            first[parameter] = name
            continue
        one = first[parameter]
        if same_values(stored[one], stored[name]):
            what = f"{one} and {name} are one weight by tie_word_embeddings in config.json, two in the files"
            raise WrongError("untied_copy", what, "apollo-sft export writes it once")
        raise WrongError(
            "tie_differs",
            f"config.json ties {one} and {name}, which differ: some readers use both, others one of them",
            "tie_word_embeddings=false in config.json",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return publish.read_json(path)
    except CheckpointError as error:
        raise WrongError("damaged_json", _line(error), "copy or export the folder again") from error


def _line(error: Exception) -> str:
    return " ".join(part.strip() for part in str(error).splitlines())[:300]


def some(names: list[str]) -> str:
    """Name the first few."""

    def shown() -> Iterator[str]:
        yield from names[:NAMED]
        if len(names) > NAMED:
            yield "…"

    return ", ".join(shown())
