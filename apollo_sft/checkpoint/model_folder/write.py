"""Model folders that plain transformers opens: from live weights, whole or sharded, or from a checkpoint."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.model_folder import sidecars
from apollo_sft.checkpoint.model_folder.conversion import ExportPlan, Group, plan_export
from apollo_sft.checkpoint.model_folder.reopen import verify_model_folder
from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.tensor_files import (
    DTYPES,
    ShardWriter,
    num_bytes,
    read_tensors,
    read_whole,
    write_tensors,
)
from apollo_sft.checkpoint.model_folder.tokenizer_files import change_tokenizer, is_tokenizer_file
from apollo_sft.checkpoint.run_folder.state import StateFiles
from apollo_sft.parallel.consensus import attempt, raise_on_all
from apollo_sft.types import BaseModel, TensorSpec

MAX_SHARD_BYTES = 5_000_000_000
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
HF_FOLDER = "hf"
"""Of a checkpoint. It is made from the files of the checkpoint: training need not stand still for it, no rank holds the
model, and no collective is needed."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """`tokenizer` is a transformers tokenizer, `chat_template` the template that was used (None: the tokenizer's own).

    `stop_token_ids` are the tokens that ended the trained turns. `trust_remote_code`: what was written is opened with
    the base's own code.
    """

    tokenizer: Any
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    export_dtype: str = "auto"
    max_shard_bytes: int = MAX_SHARD_BYTES
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class ExportResult:
    """`tensors`: what the files hold. `digests`: sha256 of each tensor's bytes (writer only). `dropped`: second names
    of tied weights in the base's files, which are written once."""

    tensors: dict[str, TensorSpec]
    digests: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def save_model(
    model: Any,
    base: BaseModel,
    folder: Path,
    options: ExportOptions,
    is_writer: bool,
    check: Callable[[Path], None] | None = None,
) -> ExportResult:
    """Export, re-open, compare and make visible in `folder`, in place of an earlier model of ours. Collective.

    `check`: what the writer asks of the written folder besides, before it is visible.
    Raises: CheckpointError on every rank when the model could not be written or is not what was to be written.
    """

    def verify(written: Path) -> None:
        verify_model_folder(written, result.tensors, result.digests, options.trust_remote_code)
        if check is not None:
            check(written)

    staging = folder / f"{publish.STAGING_PREFIX}model"
    failure = attempt(lambda: publish.staging_folder(folder, "model")) if is_writer else None
    raise_on_all(failure, model)
    result = export_model(model, base, staging, options, is_writer)
    if is_writer:
        failure = attempt(lambda: publish.publish_model(staging, folder, verify))
    raise_on_all(failure, model)
    return result


@torch.no_grad()
def export_model(model: Any, base: BaseModel, staging: Path, options: ExportOptions, is_writer: bool) -> ExportResult:
    """Write `model` (a transformers model; parameters may be DTensors) into the empty folder `staging`. Collective.

    Tensor by tensor: beside its shards, no rank holds more than the tensors that are converted together, in the dtype
    of the files, and the writer at most one file of `max_shard_bytes` more.
    Raises: CheckpointError on every rank when the writer failed on any.
    """
    plan = plan_export(model, base, options.export_dtype)
    state = model.state_dict(keep_vars=True)
    writer = ShardWriter(staging, plan.tensors, options.max_shard_bytes) if is_writer else None
    failure: Exception | None = None
    for group in plan.groups:
        # every rank takes part in every gathering, even after the writer has failed: the others would wait for ever
        sources = [_whole(state[name], name, _common_dtype(group, plan)) for name in group.sources]
        if writer is not None and failure is None:
            failure = attempt(partial(_add, writer, group, sources))
        del sources  # before the next is gathered, not after
    if writer is not None and failure is None:
        failure = attempt(lambda: finish(writer, class_name(model), base, plan, options))
    raise_on_all(failure, model)
    return ExportResult(plan.tensors, writer.digests if writer else {}, tuple(plan.dropped))


def class_name(model: Any) -> str:
    """Of the transformers class, without what FSDP2 puts before it."""
    return type(model).__name__.removeprefix("FSDP")


def _add(writer: ShardWriter, group: Group, sources: list[Tensor]) -> None:
    for name, tensor in group.split(sources).items():
        writer.add(name, tensor)


def _common_dtype(group: Group, plan: ExportPlan) -> torch.dtype | None:
    """The one dtype of all that the group becomes: then shards are cast before they travel. None when they differ.

    float16 is cast by the writer, who sees what it cannot hold.
    """
    dtypes = {DTYPES[plan.tensors[name].dtype] for name in group.targets}
    return dtypes.pop() if len(dtypes) == 1 and torch.float16 not in dtypes else None


def _whole(tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    """The full tensor, gathered when it is sharded. `name`: in memory."""
    from torch.distributed.tensor import DTensor

    found = tensor.detach() if dtype is None else cast(tensor.detach(), dtype, name)
    return found.full_tensor() if isinstance(found, DTensor) else found


def finish(writer: ShardWriter, architecture: str, base: BaseModel, plan: ExportPlan, options: ExportOptions) -> None:
    """Write what is not trained: the base's other tensors, and its files, with what training changed in them."""
    if plan.copied:
        stored = read_tensors(base.folder, follow_links=True)
        lost = [name for name in plan.copied if name not in stored]
        if lost:
            raise sidecars.base_is_gone(base.folder / lost[0])
        for name, tensor in read_whole(stored, plan.copied):
            writer.add(name, tensor)
    writer.finish()
    folder, stops = writer.folder, options.stop_token_ids
    sidecars.copy_files(folder, base, base.carried)
    sidecars.write_config(folder, base, architecture, plan.tensors, stops)
    sidecars.write_generation_config(folder, base, stops)
    change_tokenizer(folder, base, options.tokenizer, options.chat_template, stops)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """What makes a folder of an adapter: PEFT's two files, and the tokenizer that it was trained with.

    `config` is PEFT's; it will name the base by its hub id, or by an absolute path.
    """

    config: Any
    base: BaseModel
    options: ExportOptions

    def write(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write into an empty folder. `tensors`: by their names in PEFT's file."""
        source = Path(self.base.source)
        config = copy.copy(self.config)
        config.base_model_name_or_path = str(source.absolute()) if source.is_dir() else self.base.source
        config.save_pretrained(folder)
        write_tensors(tensors, folder / ADAPTER_FILE)
        sidecars.copy_files(folder, self.base, filter(is_tokenizer_file, self.base.carried))
        change_tokenizer(
            folder, self.base, self.options.tokenizer, self.options.chat_template, self.options.stop_token_ids
        )


def save_adapter(
    tensors: Mapping[str, Tensor], written: AdapterFolder, root: Path, model: Any, is_writer: bool
) -> None:
    """Write the adapter into `root/adapter/`, in PEFT's own format. Collective.

    Raises: CheckpointError on every rank when it could not be written.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = _whole(tensor, name, None)
        if is_writer:
            whole[name] = full.to("cpu", copy=True).contiguous()  # a tied weight comes twice
    raise_on_all(attempt(lambda: _publish_adapter(whole, written, root)) if is_writer else None, model)


def _publish_adapter(tensors: Mapping[str, Tensor], written: AdapterFolder, root: Path) -> None:
    final = root / ADAPTER_FOLDER
    staging = publish.staging_folder(root, ADAPTER_FOLDER)
    written.write(tensors, staging)
    if (final / publish.DIRECTORY_MANIFEST).is_file():  # of an earlier try of this run, which died later
        shutil.rmtree(final)
    publish.publish_directory(staging, final)


@dataclass(frozen=True, slots=True)
class ModelForm:
    """A full model: names of the base's own files, checked after writing.

    `names`: name in a checkpoint by name in memory, the same for tied weights. `buffers`: what no checkpoint holds.
    """

    plan: ExportPlan
    names: Mapping[str, str]
    buffers: Mapping[str, Tensor]
    architecture: str
    base: BaseModel
    options: ExportOptions

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(spec) for spec in self.plan.tensors.values())

    def write(self, checkpoint: Path) -> None:
        """Write `hf/` into the folder of a checkpoint whose state is written.

        Raises: CheckpointError when it does not read back as it was written.
        """
        folder = checkpoint / HF_FOLDER
        folder.mkdir()
        self.write_to(folder, StateFiles(checkpoint))

    def write_to(self, folder: Path, state: StateFiles) -> None:
        """Write the model of a state into an empty folder. Raises: CheckpointError as `write`."""
        writer = ShardWriter(folder, self.plan.tensors, self.options.max_shard_bytes)
        for group in self.plan.groups:
            held = {name: self.names.get(name) for name in group.sources}
            found = {name: state.read(saved) if saved else self.buffers[name] for name, saved in held.items()}
            sources = [_whole(tensor, name, _common_dtype(group, self.plan)) for name, tensor in found.items()]
            for name, tensor in group.split(sources).items():
                writer.add(name, tensor)
        finish(writer, self.architecture, self.base, self.plan, self.options)
        verify_model_folder(folder, self.plan.tensors, writer.digests, self.options.trust_remote_code)


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """A LoRA adapter in PEFT's format. `names`: name in a checkpoint by name in the adapter's file."""

    names: Mapping[str, str]
    written: AdapterFolder
    num_bytes: int

    def write(self, checkpoint: Path) -> None:
        """Write `hf/` into the folder of a checkpoint whose state is written."""
        folder = checkpoint / HF_FOLDER
        folder.mkdir()
        state = StateFiles(checkpoint)
        self.written.write({name: state.read(saved) for name, saved in self.names.items()}, folder)


def model_form(causal_lm: Any, prefix: str, base: BaseModel, options: ExportOptions) -> ModelForm:
    """`causal_lm` may be sharded or on meta; `prefix`: what stands before its names in a checkpoint."""
    first = {id(p): name for name, p in reversed(list(causal_lm.named_parameters(remove_duplicate=False)))}
    parameters = causal_lm.named_parameters(remove_duplicate=False)
    names = {name: f"{prefix}{first[id(p)]}" for name, p in parameters}
    buffers = {name: tensor for name, tensor in causal_lm.state_dict().items() if name not in names}
    plan = plan_export(causal_lm, base, options.export_dtype)
    return ModelForm(plan, names, buffers, class_name(causal_lm), base, options)
