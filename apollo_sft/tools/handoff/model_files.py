"""Check the files of a model folder for verl, TRL and vLLM: files, config, names, shapes, dtypes.

No weight is read. Training does not come here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from apollo_sft.errors import CheckpointError
from apollo_sft.model.load import in_short
from apollo_sft.tools.handoff.subject import Subject, WrongError, some
from apollo_sft.train.base_model import WRAPPERS
from apollo_sft.types import BaseModel

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PEFT_MARKS = ("lora_", ".base_layer.", "base_model.model.", ".modules_to_save.")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PREDICTED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Keys of config.json that count layers of multi-token prediction."""
LAYER = re.compile(r"\blayers\.(\d+)\.")


def is_copied(subject: Subject, name: str) -> bool:
    """Return whether a tensor that the model does not hold may be in the files.

    It may where the base has it, where transformers ignores it for this class, or where it belongs to layers of
    multi-token prediction that config.json counts.
    """
    ignored = getattr(subject.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if name in subject.of_base or any(re.search(pattern, name) for pattern in ignored):
        return True
    return counted_layers(subject.config) is not None and is_predicting(subject, name)


def counted_layers(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the key of config.json that counts layers of multi-token prediction, and their number."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in PREDICTED:
            if part.get(key):
                return key, part[key]
    return None


def is_predicting(subject: Subject, name: str) -> bool:
    """Return whether a tensor belongs to a layer behind the last one, or to multi-token prediction by its name."""
    layer = LAYER.search(name)
    behind = layer is not None and int(layer[1]) >= getattr(subject.hf_config.get_text_config(), "num_hidden_layers", 0)
    return behind or "mtp" in name or "nextn" in name


def check_form(subject: Subject) -> str:
    """Check that the folder is a model in safetensors: no pickle, and no adapter that must be merged first."""
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
    """Raise WrongError with what an adapter in the folder means for readers."""
    if "config.json" in names:
        raise WrongError(
            "adapter_beside_model",
            "there is an adapter beside the model: transformers adds it, RL and vLLM do not",
            "take adapter_config.json and adapter_model.safetensors away, unless they are to be merged",
        )

    base = str(_read(subject.folder / "adapter_config.json").get("base_model_name_or_path"))
    if base.startswith(".") or (base.count("/") != 1 and not Path(base).is_absolute()):
        raise WrongError(
            "adapter_base_unknown",
            f"the adapter names its base {base}, a path that is valid from one folder only",
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
    """Check the files that every reader needs."""
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
        raise WrongError("changed_files", what, "export again, unless the change was intended", is_note=True)

    return "config, generation config, tokenizer"


def _check_modes(subject: Subject) -> None:
    """Check that accounts that can read config.json can read all files. Raises: WrongError."""
    modes = {path.name: path.stat().st_mode & 0o444 for path in subject.folder.iterdir() if path.is_file()}
    closed = sorted(name for name, mode in modes.items() if modes["config.json"] & ~mode)
    if closed:
        what = f"{some(closed)}: accounts that can read config.json cannot read them"
        raise WrongError("unreadable_files", what, f"chmod --reference=config.json {closed[0]}")


def check_config(subject: Subject) -> str:
    """Check that transformers knows the architecture of config.json, and build its model without memory."""
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
    """Check that index and shards fit one another, and that every file is in the folder and complete."""
    folder = subject.folder
    shards = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if not shards:
        raise WrongError("missing_weights", f"no {SINGLE_FILE} and no shards", "export the model again")

    wanted = {SINGLE_FILE}
    if not (folder / SINGLE_FILE).is_file():
        if not (folder / INDEX_FILE).is_file():
            raise WrongError("missing_index", f"{some(shards)} without {INDEX_FILE}", "export the model again")
        wanted = _indexed_files(folder)

    try:
        for name in wanted:
            safe_path(folder, name)
    except CheckpointError as error:
        raise WrongError("file_outside", str(error).splitlines()[0], "copy the file itself into the folder") from error

    try:
        subject.tensors = specs_of(read_tensors(folder))
    except CheckpointError as error:
        named = "damaged_weights"
        if str(error).startswith(str(folder / INDEX_FILE)):
            named = "index_differs"
        raise WrongError(named, _line(error), "copy or export the folder again") from error

    stray = sorted(set(shards) - wanted)
    if stray:
        raise WrongError(
            "stray_weights", f"{some(stray)}: no part of the model, but some readers load them", "remove them"
        )
    if len(wanted) == 1:
        return f"{len(subject.tensors)} tensors in 1 file"
    return f"{len(subject.tensors)} tensors in {len(wanted)} files"


def _indexed_files(folder: Path) -> set[str]:
    """Return the shards that the index names. Raises: WrongError when one is elsewhere, or missing."""
    weight_map = _read(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        return set()

    wanted = set(weight_map.values())
    for name in sorted(map(str, wanted)):
        if Path(name).name != name:
            raise WrongError("file_outside", f"{INDEX_FILE} names {name}", "every shard must be in the folder itself")
        if not (folder / name).exists():
            what = f"{INDEX_FILE} names {name}, which is not there"
            raise WrongError("missing_shard", what, "copy the whole folder")

    return wanted


def check_names(subject: Subject) -> str:
    """Check that every tensor has a name and a shape that the architecture's own model takes, and none is missing."""
    model = subject.model
    held = subject.tensors
    is_adapter = re.compile("|".join(map(re.escape, PEFT_MARKS)))
    adapted = [name for name in held if is_adapter.search(name)]
    wrapped = [name for name in held if name.startswith(tuple(WRAPPERS)) and name not in adapted]
    if wrapped:
        raise WrongError(
            "wrapped_names",
            f"{some(wrapped)}: saved from a wrapper of the model, so no reader finds them",
            "save the model inside the wrapper, or remove its prefix from the names",
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
    # Tied weights have one tensor and several names: one of them is enough.
    covered = {id(state[read[name][0]]) for name in used}
    missing = [name for name, _ in model.named_parameters() if id(state[name]) not in covered]
    if missing:
        raise WrongError("missing_tensors", f"{len(missing)}: {some(missing)}", "export or copy the whole model")

    for name in used:
        memory, is_converted = read[name]
        if not is_converted and held[name].shape != tuple(state[memory].shape):
            found = f"{name} is {held[name].shape}, and {tuple(state[memory].shape)} by config.json"
            raise WrongError("shape_differs", found, "config.json and weights must belong to the same model")

    try:
        plan_export(model, BaseModel(str(subject.folder), subject.folder, subject.config, held), "auto")
    except (CheckpointError, RuntimeError, ValueError, KeyError) as error:  # of what is fused while it is loaded
        name = "shape_differs"
        if isinstance(error, CheckpointError) and "shape" not in str(error):
            name = "missing_tensors"
        raise WrongError(name, _line(error), "config.json and weights must belong to the same model") from error

    return f"all that {type(model).__name__} takes, and nothing else"


def check_dtype(subject: Subject) -> str:
    """Check that config.json states the dtype of the files."""
    found = main_dtype(subject.tensors)
    if stated_dtype(subject.config) is None:
        what = f"config.json states no dtype; the files have {found}"
        raise WrongError("dtype_not_stated", what, f'"torch_dtype": "{found}"', is_note=True)

    for key in ("dtype", "torch_dtype"):
        stated = subject.config.get(key) or found
        if stated != found:
            raise WrongError("dtype_differs", f"{stated} in config.json, {found} in the files", f'"{key}": "{found}"')

    others = {spec.dtype for spec in subject.tensors.values()} - {CONFIG_DTYPES.get(found, found)}
    if others:
        return f"{found} (and {', '.join(sorted(others))})"
    return found


def _names(subject: Subject) -> set[str]:
    return {path.name for path in subject.folder.iterdir() if path.is_file()}


def _changed(folder: Path) -> list[str]:
    """Return the files that are not as the manifest lists them; of weights the size alone is compared."""
    manifest = folder / publish.MANIFEST
    above = ""
    if not manifest.is_file():  # `hf/` of a checkpoint is in the manifest of the checkpoint
        manifest = folder / ".." / publish.DIRECTORY_MANIFEST
        above = "hf/"
    if not manifest.is_file():
        return []

    listed = _read(manifest).get("files", {})
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
    """Check that no parameter has two tensors. `parameter_of`: the parameter of each tensor. Raises: WrongError."""
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
