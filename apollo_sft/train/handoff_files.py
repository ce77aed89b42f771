"""What a model folder holds, against what verl, TRL and vLLM read of it: files, config, names, shapes, dtypes.

No weight is read. Training does not come here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.conversion import CONFIG_DTYPES, follow_names, plan_export
from apollo_sft.checkpoint.sidecars import main_dtype
from apollo_sft.checkpoint.tensor_files import INDEX_FILE, SINGLE_FILE, read_tensors, safe_path
from apollo_sft.config.schema import DataConfig
from apollo_sft.errors import CheckpointError
from apollo_sft.model.load import in_short
from apollo_sft.types import BaseModel, TensorSpec

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PEFT_MARKS = ("lora_", ".base_layer.", "base_model.model.", ".modules_to_save.")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
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

    `data`: the keys by which rows are read and rendered. `run`: the one that wrote the folder; `base`: its base model.
    `files`: parquet files whose rows are rendered, () for none. `max_new_tokens`: None is twice the longest reply of
    these rows. `model`: of config.json, on meta. `prompts`: some that were rendered.
    """

    folder: Path
    data: DataConfig
    run: Path | None = None
    base: str | None = None
    files: tuple[str, ...] = ()
    trust_remote_code: bool = False
    generate: bool = True
    max_new_tokens: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    hf_config: Any = None
    model: Any = None
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    tokenizer: Any = None
    prompts: list[str] = field(default_factory=list)
    longest_reply: int = 0


def check_form(subject: Subject) -> str:
    """A model in safetensors: no pickle, and no adapter that somebody would have to merge."""
    names = _names(subject)
    if "adapter_config.json" in names:
        raise WrongError(
            "adapter_only",
            "the folder holds an adapter, which RL and vLLM do not merge"
            + ("; transformers adds it on top of the model" if "config.json" in names else ""),
            "apollo-sft export RUN_FOLDER OUT merges it into its base; take the adapter's files away here",
        )
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise WrongError(
            "pickle_weights",
            f"{_some(pickles)}: opening a pickle can run code",
            "keep safetensors only; take the file out of the folder",
        )
    return "safetensors, no pickle, no adapter"


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
    changed = _changed(subject.folder)
    if changed:
        what = f"changed since an export wrote them: {_some(changed)}"
        raise WrongError("changed_files", what, "export again, unless somebody meant it", is_note=True)
    return "config, generation config, tokenizer"


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
            raise WrongError("missing_index", f"{_some(shards)} without {INDEX_FILE}", "export the model again")
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
        subject.tensors = {name: stored.spec for name, stored in read_tensors(folder).items()}
    except CheckpointError as error:
        named = "index_differs" if str(error).startswith(str(folder / INDEX_FILE)) else "damaged_weights"
        raise WrongError(named, _line(error), "copy or export the folder again") from error
    stray = sorted(set(shards) - wanted)
    if stray:
        raise WrongError(
            "stray_weights", f"{_some(stray)}: no part of the model, but some readers load them", "remove them"
        )
    return f"{len(subject.tensors)} tensors in {len(wanted)} file{'s' * (len(wanted) > 1)}"


def check_names(subject: Subject) -> str:
    """Every tensor has a name and a shape that the architecture's own model takes, and none is missing."""
    model, held = subject.model, subject.tensors
    adapted = [name for name in held if any(mark in name for mark in PEFT_MARKS)]
    if adapted:
        raise WrongError("peft_names", _some(adapted), "merge the adapter: apollo-sft export does")
    state = model.state_dict(keep_vars=True)
    read = follow_names(model, held)
    unknown = [name for name in held if read[name][0] not in state]
    if unknown:
        raise WrongError(
            "unexpected_tensors",
            f"{len(unknown)} that {type(model).__name__} does not hold: {_some(unknown)}",
            "names must be those of the base model's own files",
        )
    _check_tied({name: id(state[read[name][0]]) for name in held if not read[name][1]})
    covered = {id(state[memory]) for memory, _ in read.values()}
    missing = [name for name, _ in model.named_parameters() if id(state[name]) not in covered]
    if missing:
        raise WrongError("missing_tensors", f"{len(missing)}: {_some(missing)}", "export or copy the whole model")
    for name, (memory, is_converted) in read.items():
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
    for key in ("dtype", "torch_dtype"):
        stated = subject.config.get(key, found if key == "torch_dtype" or "torch_dtype" in subject.config else "none")
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


def _check_tied(parameter_of: dict[str, int]) -> None:
    first: dict[int, str] = {}
    for name, parameter in parameter_of.items():
        if parameter in first:
            raise WrongError(
                "untied_copy",
                f"{first[parameter]} and {name} are one weight by tie_word_embeddings in config.json, two in the files",
                "apollo-sft export writes it once; or tie_word_embeddings=false if they differ on purpose",
            )
        first[parameter] = name


def _read(path: Path) -> dict[str, Any]:
    try:
        return publish.read_json(path)
    except CheckpointError as error:
        raise WrongError("damaged_json", _line(error), "copy or export the folder again") from error


def _line(error: Exception) -> str:
    return " ".join(part.strip() for part in str(error).splitlines())[:300]


def _some(names: list[str]) -> str:
    def shown() -> Iterator[str]:
        yield from names[:NAMED]
        if len(names) > NAMED:
            yield "…"

    return ", ".join(shown())
