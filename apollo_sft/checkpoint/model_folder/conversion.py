"""From the names that transformers holds in memory back to the names of the base model's own files.

transformers 5 converts while it loads: it renames, and it fuses (all experts of a layer become one tensor). The plan
here follows each name of the base's files through that conversion, so that what is written back is what was read. It
is made on meta tensors: names, shapes and dtypes are known before a run starts.

One layer of a mixture with two experts, for example (`E` for `experts`):

    base's files                                     in memory                        group
    layers.0.E.0.up.weight, layers.0.E.1.up.weight   layers.0.E.up, one 3-D tensor    1 source, 2 targets: it is split
    layers.0.norm.weight                             layers.0.norm.weight             1 source, 1 target: renamed

The base's names are followed forwards, one by one (`_Reader.follow`); then transformers' own reversed converters are
applied to the tensors in memory (`_Split`), and must give exactly the names that were followed.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apollo_sft.checkpoint.model_folder.tensor_files import DTYPE_NAMES, DTYPES
from apollo_sft.errors import CheckpointError
from apollo_sft.types import BaseModel, TensorSpec

FORCED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
CONFIG_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
FLOATS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are converted together."""

    sources: tuple[str, ...]
    """Names in memory."""
    targets: tuple[str, ...]
    """Names in the files."""
    split: Callable[[list[Tensor]], dict[str, Tensor]]
    """Makes the tensors by target name from the full sources, in order."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The content of the files to be written."""

    groups: list[Group]
    tensors: dict[str, TensorSpec]
    """Shape and dtype of every tensor, in the order of writing."""
    copied: list[str] = field(default_factory=list)
    """Tensors of the base that the model does not hold, for example a layer of multi-token prediction: they are copied
    from the base's files."""
    dropped: list[str] = field(default_factory=list)
    """Second names of tied weights, which are written once."""


@dataclass(frozen=True, slots=True)
class _Read:
    """The way of one tensor from the base's files into memory."""

    base_name: str
    """The name in the base's files."""
    memory_name: str
    """The name in memory."""
    pattern: str | None
    """The pattern of the converter that fuses or splits it; None when it is at most renamed."""
    between: str
    """The name after the renamings, before the converter."""


def plan_export(model: Any, base: BaseModel, export_dtype: str) -> ExportPlan:
    """Plan the files for `model`, a transformers model whose parameters may be sharded or on meta.

    Raises: CheckpointError when the base's files cannot be written back from what the model holds in memory.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    wanted = dict(base.tensors) or _default_names(model, state, meta)
    reader = _Reader(model, meta)
    reads = [reader.follow(name) for name in sorted(wanted, key=_natural_key)]

    # What transformers only renames, what it fuses or splits, and what the base's files lack.
    direct = [read for read in reads if read.pattern is None and read.memory_name in meta]
    groups = _direct_groups(_once(direct, state))
    groups += reader.converted_groups([read for read in reads if read.pattern is not None])
    covered: set[str] = set()
    for group in groups:
        covered.update(group.sources)

    groups += _extra_groups(model, state, covered)
    groups.sort(key=lambda group: _natural_key(group.targets[0]))

    # The conversion itself is run, on meta tensors: shapes come out of it as they will at the end of the run.
    made: dict[str, Tensor] = {}
    for group in groups:
        made.update(group.split([meta[source] for source in group.sources]))

    _check_shapes(made, _with_added_tokens(base, model, state, reads))

    tensors: dict[str, TensorSpec] = {}
    for group in groups:
        for name in group.targets:
            dtype = _file_dtype(name, made[name].dtype, base, export_dtype)
            tensors[name] = TensorSpec(tuple(made[name].shape), dtype)

    copied = [read.base_name for read in reads if read.memory_name not in meta]
    tensors |= {name: base.tensors[name] for name in copied}
    return ExportPlan(groups, tensors, copied, sorted(set(wanted) - set(tensors), key=_natural_key))


def follow_names(model: Any, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return (name in memory, whether it is fused or split there) for each name in files.

    As transformers would load them into `model`, which may be on meta. A name that is not read keeps its own, which
    the model does not hold.
    """
    reader = _Reader(model, model.state_dict(keep_vars=True))
    reads = [reader.follow(name) for name in names]
    return {read.base_name: (read.memory_name, read.pattern is not None) for read in reads}


def _file_dtype(name: str, held: torch.dtype, base: BaseModel, export_dtype: str) -> str:
    if not held.is_floating_point:
        return DTYPE_NAMES[held]
    if export_dtype in FORCED:
        return FORCED[export_dtype]
    if export_dtype != "auto":
        raise CheckpointError("trainer.export_dtype", found=export_dtype, expected=f"auto, {', '.join(FORCED)}")

    if name in base.tensors:
        dtype = base.tensors[name].dtype
        if dtype not in FLOATS:
            raise CheckpointError(
                f"the base stores {name} in a quantised form that cannot be written back",
                found=dtype,
                fix="start from the unquantised model",
            )
        return dtype

    # A tensor without a counterpart in the base's files gets the dtype that its config.json states.
    stated = base.config.get("dtype") or base.config.get("torch_dtype")
    return CONFIG_DTYPES.get(str(stated), "F32")


def _with_added_tokens(
    base: BaseModel, model: Any, state: Mapping[str, Tensor], reads: Iterable[_Read]
) -> dict[str, TensorSpec]:
    """Return what the base's files would hold if they had rows for the tokens that the run adds."""
    specs = dict(base.tensors)
    if base.new_tokens is None:
        return specs

    # Embedding and head are known by the tensor itself: their names differ between architectures, and they may be tied.
    tables: set[int] = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        tables.update(id(table) for table in module.parameters(recurse=False))

    for read in reads:
        if read.base_name in specs and id(state.get(read.memory_name)) in tables:
            held, *rest = specs[read.base_name].shape
            shape = (held + base.new_tokens.rows - base.new_tokens.held, *rest)
            specs[read.base_name] = TensorSpec(shape, specs[read.base_name].dtype)

    return specs


def _check_shapes(made: Mapping[str, Tensor], base: Mapping[str, TensorSpec]) -> None:
    for name, tensor in made.items():
        if name in base and base[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} does not have the shape that it has in the base's files",
                found=tuple(tensor.shape),
                expected=base[name].shape,
            )


def _once(reads: list[_Read], state: Mapping[str, Tensor]) -> list[_Read]:
    """Drop second names of a tied weight, which some bases store twice. The first name in the model is kept."""
    order = {name: at for at, name in enumerate(state)}
    # From the last to the first: a later entry of a dict replaces an earlier one, so the first in the model remains.
    backwards = sorted(reads, key=lambda read: -order[read.memory_name])
    kept = {id(state[read.memory_name]): read for read in backwards}
    return [read for read in reads if kept[id(state[read.memory_name])] is read]


def _direct_groups(reads: list[_Read]) -> list[Group]:
    return [Group((read.memory_name,), (read.base_name,), _Rename(read.base_name)) for read in reads]


def _extra_groups(model: Any, state: Mapping[str, Tensor], covered: set[str]) -> list[Group]:
    """Make groups of the persistent buffers that the base's files lack.

    Raises: CheckpointError for a parameter that they lack, unless it is tied to one that they hold.
    """
    tied = {id(state[name]) for name in covered}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in state if name not in covered and id(state[name]) not in tied]
    lost = [name for name in missing if name in parameters]

    head = model.get_output_embeddings()
    if lost and head is not None and all(state[name] is head.weight for name in lost):
        raise CheckpointError(
            "config.json says that the head is a weight of its own, and the files do not hold it",
            found=f"tie_word_embeddings=false in config.json, no {', '.join(lost)} in the files",
            fix="tie_word_embeddings=true in config.json, if the head is the embedding; else take the whole model",
        )
    if lost:
        raise CheckpointError(
            "the model holds weights that the base's files do not, so they have no name to be written under",
            found=", ".join(lost[:5]),
            fix="start from a model folder that transformers loads without missing or quantised weights",
        )
    return [Group((name,), (name,), _Rename(name)) for name in missing]


def _default_names(model: Any, state: Mapping[str, Tensor], meta: dict[str, Tensor]) -> dict[str, TensorSpec]:
    """Return the tensors that `save_pretrained` would write, for a model that was not read from safetensors files."""
    from transformers.core_model_loading import revert_weight_conversion

    first = {id(tensor): name for name, tensor in reversed(list(state.items()))}
    once = {name: meta[name] for name, tensor in state.items() if first[id(tensor)] == name}
    names = revert_weight_conversion(model, once)
    return {name: TensorSpec(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]) for name, tensor in names.items()}


class _Rename:
    """The identity, under another name."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self, sources: list[Tensor]) -> dict[str, Tensor]:
        return {self.target: sources[0]}


class _Reader:
    """Follow transformers' own conversion of one model class: forwards for names, backwards for tensors."""

    def __init__(self, model: Any, meta: dict[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self.model = model
        self.meta = meta
        self.renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]

    def follow(self, base_name: str) -> _Read:
        """Follow one name of the base's files by the steps that transformers takes when it loads."""
        from transformers.core_model_loading import apply_renamings, rename_source_key

        prefix = self.model.base_model_prefix
        between = apply_renamings(base_name, self.renamings)
        name, pattern = rename_source_key(base_name, self.renamings, self.converters, prefix, self.meta)

        # A file that is already in the form of the memory must not be converted a second time.
        if name not in self.meta and base_name in self.meta:
            name, pattern = rename_source_key(base_name, [], [], prefix, self.meta)

        # No converter for what the model does not hold: it is copied from file to file.
        if name not in self.meta:
            return _Read(base_name, name, None, between)
        return _Read(base_name, name, pattern, between)

    def converted_groups(self, reads: list[_Read]) -> list[Group]:
        """Make groups of what was fused or split while loading.

        Raises: CheckpointError when the reversed conversion does not give the names that were read.
        """
        # A reversed converter may write the prefix of the inner model (`model.`) or leave it out.
        names = {}
        for read in reads:
            names[read.between] = read.base_name
            names[f"{self.model.base_model_prefix}.{read.between}"] = read.base_name

        groups = []
        for converter in self._used(reads):
            for first_name, sources in self._sources(converter, reads).items():
                split = _Split(converter, first_name, sources, self.model, names)
                made = split([self.meta[name] for name, _ in sources])
                groups.append(Group(tuple(name for name, _ in sources), tuple(made), split))

        unmade_names = {read.base_name for read in reads}
        for group in groups:
            unmade_names.difference_update(group.targets)

        unmade = sorted(unmade_names, key=_natural_key)
        if unmade:
            raise CheckpointError(
                f"the conversion of {type(self.model).__name__} by transformers cannot be reversed",
                found=f"nothing gives {', '.join(unmade[:5])}",
            )
        return groups

    def _used(self, reads: list[_Read]) -> list[Any]:
        """Return the converters that these names went through, reversed, and in reversed order."""
        patterns = {read.pattern for read in reads}
        used = [entry for entry in self.converters if patterns & set(entry.source_patterns)]
        return [entry.reverse_transform() for entry in reversed(used)]

    def _sources(self, converter: Any, reads: list[_Read]) -> dict[str, list[tuple[str, str]]]:
        """Return (name in memory, pattern that it matches) by the first name that the converter makes of them."""
        sources: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(self.meta, key=_natural_key):
            made, pattern = converter.rename_source_key(name)
            if pattern is not None:
                sources[made].append((name, pattern))

        # Its patterns may match tensors that the base's files held in this form already: those were not converted.
        converted = {read.memory_name for read in reads}
        return {made: found for made, found in sources.items() if any(name in converted for name, _ in found)}


class _Split:
    """Apply a reversed converter to the tensors of one group."""

    def __init__(
        self, converter: Any, first_name: str, sources: list[tuple[str, str]], model: Any, names: Mapping[str, str]
    ) -> None:
        self.converter = converter
        self.first_name = first_name
        self.sources = sources
        self.model = model
        self.names = names

    def __call__(self, sources: list[Tensor]) -> dict[str, Tensor]:
        # A converter collects the tensors that it is given: each group needs a fresh one.
        converter = copy.deepcopy(self.converter)
        for (name, pattern), tensor in zip(self.sources, sources, strict=True):
            converter.add_tensor(self.first_name, name, pattern, tensor)

        made = converter.convert(self.first_name, model=self.model, config=self.model.config)

        tensors = {}
        for name, value in made.items():
            tensors[name] = value[0] if isinstance(value, list) else value

        strange = sorted(set(tensors) - set(self.names))
        if strange:
            raise CheckpointError(
                f"the conversion of {type(self.model).__name__} by transformers cannot be reversed",
                found=f"{', '.join(strange[:5])}, which the base's files do not hold",
            )
        return {self.names[name]: tensor for name, tensor in tensors.items()}


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that orders `layers.2` before `layers.10`."""
    key = []
    for part in re.split(r"(\d+)", name):
        if part.isdigit():
            key.append((0, int(part), ""))
        else:
            key.append((1, 0, part))

    return key
