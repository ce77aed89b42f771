"""Write model folders that plain transformers opens: from live weights, full or sharded, or from a checkpoint."""

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
"""The model folder in a checkpoint. It is made from the files of the checkpoint: training need not wait for it, no rank
holds the model, and no collective is needed."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Settings of an export."""

    tokenizer: Any
    """A transformers tokenizer: the one of the training."""
    chat_template: str | None = None
    """The template of the training; None for the tokenizer's own."""
    stop_token_ids: tuple[int, ...] = ()
    """The tokens that ended the trained turns."""
    export_dtype: str = "auto"
    max_shard_bytes: int = MAX_SHARD_BYTES
    trust_remote_code: bool = False
    """Open the written folder with the base's own code."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export wrote."""

    tensors: dict[str, TensorSpec]
    """Shape and dtype of every tensor in the files."""
    digests: dict[str, str] = field(default_factory=dict)
    """The sha256 of each tensor's bytes; on the writer only."""
    dropped: tuple[str, ...] = ()
    """Second names of tied weights in the base's files, which are written once."""


def save_model(
    model: Any,
    base: BaseModel,
    folder: Path,
    options: ExportOptions,
    is_writer: bool,
    check: Callable[[Path], None] | None = None,
) -> ExportResult:
    """Export, re-open, compare and make visible in `folder`, in place of an earlier model of ours. Collective.

    `check`: called by the writer with the written folder, before it is visible.
    Raises: CheckpointError on every rank when the model could not be written or is not what was to be written.
    """

    def verify(written: Path) -> None:
        verify_model_folder(written, result.tensors, result.digests, options.trust_remote_code)
        if check is not None:
            check(written)

    staging = folder / f"{publish.STAGING_PREFIX}model"
    failure: Exception | None = None
    if is_writer:
        failure = attempt(lambda: publish.staging_folder(folder, "model"))

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
        # Every rank takes part in every gathering, even after the writer has failed: the others would wait for ever.
        sources = [_whole(state[name], name, _common_dtype(group, plan)) for name in group.sources]
        if writer is not None and failure is None:
            failure = attempt(partial(_add, writer, group, sources))
        del sources  # before the next group is gathered, not after

    if writer is not None and failure is None:
        failure = attempt(lambda: finish(writer, class_name(model), base, plan, options))

    raise_on_all(failure, model)
    return ExportResult(plan.tensors, writer.digests if writer else {}, tuple(plan.dropped))


def class_name(model: Any) -> str:
    """Return the name of the transformers class, without the prefix that FSDP2 gives it."""
    return type(model).__name__.removeprefix("FSDP")


def _add(writer: ShardWriter, group: Group, sources: list[Tensor]) -> None:
    for name, tensor in group.split(sources).items():
        writer.add(name, tensor)


def _common_dtype(group: Group, plan: ExportPlan) -> torch.dtype | None:
    """Return the dtype in the files of all targets of the group, None when they differ.

    Shards are cast to it before they are gathered. float16 is left to the writer, which reports numbers that it cannot
    hold.
    """
    dtypes = {DTYPES[plan.tensors[name].dtype] for name in group.targets}
    if len(dtypes) > 1 or torch.float16 in dtypes:
        return None
    return dtypes.pop()


def _whole(tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    """Return the full tensor, gathered when it is sharded. `name`: in memory."""
    from torch.distributed.tensor import DTensor

    found = tensor.detach()
    if dtype is not None:
        found = cast(found, dtype, name)
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

    # The base's files are copied first: the rest changes those copies.
    folder = writer.folder
    stops = options.stop_token_ids
    sidecars.copy_files(folder, base, base.carried)
    sidecars.write_config(folder, base, architecture, plan.tensors, stops)
    sidecars.write_generation_config(folder, base, stops)
    change_tokenizer(folder, base, options.tokenizer, options.chat_template, stops)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """Writes the folder of an adapter: PEFT's two files, and the tokenizer of the training."""

    config: Any
    """PEFT's. The written one names the base by its hub id, or by an absolute path."""
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
            # A copy, since a tied weight comes twice, and safetensors refuses tensors that share memory.
            whole[name] = full.to("cpu", copy=True).contiguous()

    failure: Exception | None = None
    if is_writer:
        failure = attempt(lambda: _publish_adapter(whole, written, root))

    raise_on_all(failure, model)


def _publish_adapter(tensors: Mapping[str, Tensor], written: AdapterFolder, root: Path) -> None:
    final = root / ADAPTER_FOLDER
    staging = publish.staging_folder(root, ADAPTER_FOLDER)
    written.write(tensors, staging)
    if (final / publish.DIRECTORY_MANIFEST).is_file():  # from an earlier attempt of this run, which was killed later
        shutil.rmtree(final)
    publish.publish_directory(staging, final)


@dataclass(frozen=True, slots=True)
class ModelForm:
    """Writes a checkpoint as a full model under the names of the base's own files, and checks what it wrote."""

    plan: ExportPlan
    names: Mapping[str, str]
    """The name in a checkpoint by the name in memory. Tied weights have the same one."""
    buffers: Mapping[str, Tensor]
    """Tensors that no checkpoint holds."""
    architecture: str
    base: BaseModel
    options: ExportOptions

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the weights in the files."""
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
            dtype = _common_dtype(group, self.plan)
            sources = []
            for name in group.sources:
                found = state.read(self.names[name]) if name in self.names else self.buffers[name]
                sources.append(_whole(found, name, dtype))
            _add(writer, group, sources)

        finish(writer, self.architecture, self.base, self.plan, self.options)
        verify_model_folder(folder, self.plan.tensors, writer.digests, self.options.trust_remote_code)


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """Writes a checkpoint as a LoRA adapter in PEFT's format."""

    names: Mapping[str, str]
    """The name in a checkpoint by the name in the adapter's file."""
    written: AdapterFolder
    num_bytes: int
    """The bytes of the adapter's tensors."""

    def write(self, checkpoint: Path) -> None:
        """Write `hf/` into the folder of a checkpoint whose state is written."""
        folder = checkpoint / HF_FOLDER
        folder.mkdir()
        state = StateFiles(checkpoint)
        self.written.write({name: state.read(saved) for name, saved in self.names.items()}, folder)


def model_form(causal_lm: Any, prefix: str, base: BaseModel, options: ExportOptions) -> ModelForm:
    """Build the form of `causal_lm`, which may be sharded or on meta. `prefix`: of its names in a checkpoint."""
    # A checkpoint holds a tied weight once, under its first name. Backwards, so that the first name remains.
    parameters = list(causal_lm.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters)}
    names = {name: f"{prefix}{first[id(parameter)]}" for name, parameter in parameters}
    buffers = {name: tensor for name, tensor in causal_lm.state_dict().items() if name not in names}
    plan = plan_export(causal_lm, base, options.export_dtype)
    return ModelForm(plan, names, buffers, class_name(causal_lm), base, options)
