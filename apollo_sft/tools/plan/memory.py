"""Count the memory of a rank during a step: run the real step on tensors that have shapes but no memory.

The model, the sharding, the head, the optimizer and the step are those of a training. Weights are fake tensors, and
the other ranks are a process group without answers: a model of any size on any number of ranks takes seconds.

A worked example: 32 layers of one kind, 50,000 targets in a forward, chunks of the head with 1,024 targets.

1. The step runs with 3 layers and 3 chunks. At the moment of the backward when a rank holds most, it holds
   600 MB of parameters and 90 MB of activations.
2. It runs once more with 4 layers, and holds 700 MB and 120 MB: a layer takes 100 MB and 30 MB.
3. It runs once more with 3 layers and 4 chunks, and holds 8 MB more: a chunk takes 8 MB.
4. The model has 29 layers more, and the forward 50,000 / 1,024 - 3 = 45.8 chunks more:
   parameters 600 + 29 x 100 = 3,500 MB, activations 90 + 29 x 30 = 960 MB, head 45.8 x 8 = 366 MB more.

That is done for each phase of the step (forward, backward, update) and each part of the memory. The result is the
phase in which all parts together take most. Three repeats and not one: the first and the last may hold more than
those between them, and what the fourth adds is what any other would add.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # for collectives on tensors without memory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_sft.config.schema import ModelConfig, SftConfig
from apollo_sft.data.batch.loader import StepBatch
from apollo_sft.model import attention, four_bit, load, lora
from apollo_sft.model.attention import AttentionOptions, Documents
from apollo_sft.model.head import chunk_rows
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.fsdp2 import fill_buffers
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.plan.allocations import HEAD, LAYERS, OPTIMIZER, SHARDING, Allocations, recorded
from apollo_sft.tools.plan.layers import Kind, layer_lists, num_of_kinds, remove_layers
from apollo_sft.train.assemble import optimizer_of, stored_dtype
from apollo_sft.train.optim.build import fill_state
from apollo_sft.train.precision import DTYPES, resolve_precision
from apollo_sft.train.sharding import head_exchange, needs_group, offloads, shard_model
from apollo_sft.train.step import train_step
from apollo_sft.types import MicroBatch

PARAMETERS = "parameters"
GRADIENTS = "gradients"
STATE = "optimizer state"
ACTIVATIONS = "activations"
WORKING = "working memory"
GATHERED = "gathered weights"
UPDATE = "update"
PARTS = (PARAMETERS, GRADIENTS, STATE, ACTIVATIONS, HEAD, GATHERED, WORKING, UPDATE)
NAMES = {LAYERS: WORKING, SHARDING: GATHERED, OPTIMIZER: UPDATE}
OFFLOADED = frozenset({PARAMETERS, GRADIENTS, STATE, UPDATE})
FORWARD = "forward"
LAST_BACKWARD = "backward of the last layer"
OTHER_BACKWARDS = "backward of the other layers"
PHASES = (FORWARD, LAST_BACKWARD, OTHER_BACKWARDS, UPDATE)
HOST = "host"
CPU = torch.device("cpu")
REPEATS = 3
"""Layers of each kind, and chunks of the head, that run; with one more it is measured what each of the others takes."""
MICRO_BATCHES = 2
"""Forwards of a step that run: from the second one on there are gradients already."""

Parts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward of a sequence group."""

    lengths: tuple[int, ...]
    """Tokens of each document."""

    targets: int
    """Targets in the slice of one rank."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that are planned for."""

    size: int

    on_cuda: bool
    """Whether they have GPUs. What runs here is the same code on CPU tensors."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one rank at the moment of the step at which it holds most."""

    when: str
    """The phase with that moment."""

    parts: Parts

    host: Parts
    """Bytes on the CPU, by offload."""

    @property
    def total(self) -> int:
        """Return the sum of all parts but those on the CPU."""
        return round(sum(self.parts.values()))


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers operations whose result depends on values: any number is 1, a mask selects as many rows as targets."""

    def __init__(self, targets: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.targets = targets

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].dtype == torch.bool:
                return True
            if args[0].dtype.is_floating_point:
                return 1.0
            return 1
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self.targets, args[0].ndim), dtype=torch.int64)
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # On CPU tensors torch has it in bfloat16 only.
            first, second, *others = args
            product = func(first.to(torch.bfloat16), second.to(torch.bfloat16), *others, **(kwargs or {}))
            return product.to(first.dtype)

        return func(*args, **(kwargs or {}))


def step_memory(
    config: SftConfig, hf_config: Any, ranks: Ranks, pack: Pack, micro_batches: int, repeats: int = REPEATS
) -> StepMemory:
    """Return the memory of a step over `micro_batches` of `pack`, in a run that has an optimizer state.

    `repeats`: see `REPEATS`.

    Raises: ConfigError, ModelError, TopologyError as a training.
    """
    config = config.model_copy(update={"model": _with_dtype(config.model, ranks)})
    kinds = num_of_kinds(meta_model(config.model, hf_config, ranks))
    layers = {kind: min(number, repeats) for kind, number in kinds.items()}
    chunk = chunk_rows(hf_config.get_text_config().hidden_size)
    small_pack = replace(pack, targets=min(pack.targets, repeats * chunk))
    step = _Step(config, hf_config, ranks, small_pack, min(MICRO_BATCHES, micro_batches))

    # The small step, then one with another layer of each kind, then one with another chunk of the head.
    base = step.peaks(layers)
    total = {when: dict(parts) for when, parts in base.items()}
    for kind, number in kinds.items():
        if number > layers[kind]:
            with_layer = step.peaks(layers | {kind: layers[kind] + 1})
            _add_growth(total, base, with_layer, number - layers[kind])

    if pack.targets > small_pack.targets:
        larger_step = replace(step, pack=replace(small_pack, targets=small_pack.targets + chunk))
        _add_growth(total, base, larger_step.peaks(layers), (pack.targets - small_pack.targets) / chunk)

    host = total.pop(HOST)
    when = max(total, key=lambda name: sum(total[name].values()))
    return StepMemory(when, total[when], host)


def _add_growth(
    total: dict[str, dict[str, float]], base: dict[str, Parts], larger: dict[str, Parts], factor: float
) -> None:
    """Add to `total`, in place, `factor` times the difference between the `larger` step and the `base` step."""
    for when, parts in total.items():
        for part in parts:
            parts[part] += factor * (larger[when][part] - base[when][part])


def _with_dtype(model: ModelConfig, ranks: Ranks) -> ModelConfig:
    """Return the keys with the dtype that `auto` becomes on the planned ranks: here there are only CPU tensors."""
    compute = resolve_precision(model, ranks.on_cuda).compute
    name = next(name for name, dtype in DTYPES.items() if dtype == compute)
    fsdp = model.fsdp_config.model_copy(update={"dtype": name})
    return model.model_copy(update={"fsdp_config": fsdp})


def meta_model(model: ModelConfig, hf_config: Any, ranks: Ranks) -> Any:
    """Build the causal language model without memory, with adapters. Raises: ConfigError, ModelError."""
    attention.register(attention.sdpa_kernel)  # its name must be known; nothing runs
    model = _with_dtype(model, ranks)
    adapter = lora.lora_config(model, model.partial_pretrain)
    stored = stored_dtype(model, World(0, ranks.size, 0, CPU), adapter is not None)
    built = load.build_on_meta(hf_config, stored, model.trust_remote_code)
    causal_lm = four_bit.quantised(model, built, adapter)
    if adapter is not None:
        lora.inject(causal_lm, adapter, resolve_precision(model, ranks.on_cuda).master)
    return causal_lm


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of the small model: of each kind of layer, and of the head, only as much as is measured."""

    config: SftConfig
    hf_config: Any
    ranks: Ranks
    pack: Pack
    micro_batches: int

    @property
    def world(self) -> World:
        """Return this process as rank 0 of the planned ranks."""
        return World(0, self.ranks.size, 0, CPU)

    def peaks(self, layers: Mapping[Kind, int]) -> dict[str, Parts]:
        """Return the parts at the worst moment of each phase; and, as HOST, those offloaded.

        `layers`: how many layers of each kind run.
        """
        try:
            with _group(self.config.model, self.ranks), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._peaks(layers)
        finally:
            attention.register(attention.sdpa_kernel)

    def _peaks(self, num_layers: Mapping[Kind, int]) -> dict[str, Parts]:
        fsdp_size = self.config.model.fsdp_config.fsdp_size
        mesh = build_mesh(self.world, self.config.ulysses_sequence_parallel_size, fsdp_size)
        causal_lm = meta_model(self.config.model, self.hf_config, self.ranks)
        remove_layers(causal_lm, num_layers)
        layers = list(itertools.chain.from_iterable(layer_lists(causal_lm)))
        attention.register(self._kernel(), head_exchange(mesh))
        model = SftModel(causal_lm, mesh.sp_rank, mesh.sp_size)
        # FSDP1 allocates memory while it shards: it must run where tensors are fake. FSDP2 shards on meta.
        shards_fake = self.config.model.strategy == "fsdp" and self.ranks.size > 1
        if not shards_fake:
            model = shard_model(self.config.model, model, self.world, mesh)

        with FakeTensorMode(allow_non_fake_inputs=True), _Answers(self.pack.targets):
            if shards_fake:
                model = shard_model(self.config.model, model, self.world, mesh)
                fill_buffers(model, None, CPU)
            else:
                model.to_empty(device="cpu")
            # Where nothing is sharded, memory was allocated for each of two tied weights.
            if mesh.shard is None:
                causal_lm.tie_weights()
            optimizer = optimizer_of(model, self.config.optim)
            timeline, marks = self._run(model, optimizer, layers[max(0, len(layers) - 2)])

        return _worst_moments(timeline, marks, offloads(self.config.model) and self.ranks.on_cuda)

    def _kernel(self) -> attention.Kernel:
        lengths = list(self.pack.lengths)
        wants_varlen = self.ranks.on_cuda and self.config.model.attn_implementation != "sdpa"

        def kernel(q: Tensor, k: Tensor, v: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
            if wants_varlen and options.plain and not options.dropout and q.dtype == torch.bfloat16:
                return attention.varlen_kernel(q, k, v, documents, options)
            return attention.one_by_one(q, k, v, lengths, options)

        return kernel

    def _run(
        self, model: SftModel, optimizer: Optimizer, second_last: nn.Module
    ) -> tuple[Allocations, list[tuple[int, str]]]:
        """Run the step; return its record, and where its phases begin."""
        fill_state(optimizer)
        with recorded() as timeline:
            timeline.add([*model.parameters(), *model.buffers()], PARAMETERS)
            for state in optimizer.state.values():
                timeline.add((tensor for tensor in state.values() if isinstance(tensor, Tensor)), STATE)

            marks = _marks(timeline, model, optimizer, second_last)
            batch = StepBatch(0, 0, [self._micro_batch()] * self.micro_batches, [[]] * self.micro_batches, 1, 1, 1)
            train_step(model, optimizer, batch, self.world, self.config.optim.clip_grad)

        return timeline, marks

    def _micro_batch(self) -> MicroBatch:
        row = torch.zeros(1, sum(self.pack.lengths), dtype=torch.int64)
        starts = torch.zeros(len(self.pack.lengths) + 1, dtype=torch.int32)
        return MicroBatch(row, row.clone(), row.clone(), starts, self.pack.targets)


@contextmanager
def _group(model: ModelConfig, ranks: Ranks) -> Iterator[None]:
    """Enter a process group without other processes, where a single process needs one or there are several ranks."""
    if ranks.size == 1 and not needs_group(model, ranks.on_cuda):
        yield
        return

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks.size)
    try:
        yield
    finally:
        gc.collect()  # frees what holds sub-groups, which must be gone before the group itself
        dist.destroy_process_group()


def _marks(
    timeline: Allocations, model: SftModel, optimizer: Optimizer, second_last: nn.Module
) -> list[tuple[int, str]]:
    """Return a list that fills while the step runs: at which event each phase began.

    Before the update gradients are given their kind: only then all of them exist.
    """
    marks = [(0, FORWARD)]

    def mark(when: str) -> None:
        if marks[-1][1] != when:
            marks.append((timeline.now, when))

    def layer_done(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        hidden = output
        if isinstance(output, tuple):
            hidden = output[0]
        # The backward reaches the output of the second last layer when that of the last layer is done.
        if marks[-1][1] == FORWARD and hidden.requires_grad:
            hidden.register_hook(lambda _: mark(OTHER_BACKWARDS))

    def before_update(*_: Any) -> None:
        timeline.add((p.grad for p in model.parameters() if p.grad is not None), GRADIENTS)
        mark(UPDATE)

    inner: Any = model
    if isinstance(model, FullyShardedDataParallel):
        inner = model.module

    inner.register_forward_pre_hook(lambda *_: mark(FORWARD))
    inner.register_forward_hook(lambda *_: mark(LAST_BACKWARD))
    second_last.register_forward_hook(layer_done)
    optimizer.register_step_pre_hook(before_update)
    return marks


def _worst_moments(timeline: Allocations, marks: list[tuple[int, str]], offloaded: bool) -> dict[str, Parts]:
    """Return the parts of the memory at the worst moment of each phase, and of the memory on the CPU as HOST."""
    host_parts: frozenset[str] = frozenset()
    if offloaded:
        host_parts = OFFLOADED

    _name_kinds(timeline, [at for at, when in marks if when == LAST_BACKWARD])

    on_device = timeline.live_bytes(without=host_parts)
    ends = [at for at, _ in marks[1:]] + [timeline.now + 1]
    found: dict[str, Parts] = {}
    for phase in PHASES:
        # A phase comes once for each micro-batch, but the update.
        spans = [slice(at, end) for (at, when), end in zip(marks, ends, strict=True) if when == phase]
        worst = max((span.start + int(on_device[span].argmax()) for span in spans), key=lambda at: on_device[at])
        found[phase] = _parts(timeline, worst, set(PARTS) - host_parts)

    on_host = timeline.live_bytes(without=frozenset(PARTS) - host_parts)
    found[HOST] = _parts(timeline, int(on_host.argmax()), set(host_parts))
    return found


def _name_kinds(timeline: Allocations, backwards: list[int]) -> None:
    """Give allocations the names of the parts that are shown. `backwards`: the events at which backwards begin.

    Memory of the layers that lives when a backward begins was kept for it: activations.
    """
    for allocation in timeline.timeline:
        allocation.kind = NAMES.get(allocation.kind, allocation.kind)
        end = timeline.now
        if allocation.death is not None:
            end = allocation.death
        if allocation.kind == WORKING and any(allocation.birth <= begin < end for begin in backwards):
            allocation.kind = ACTIVATIONS


def _parts(timeline: Allocations, moment: int, wanted: Collection[str]) -> dict[str, float]:
    """Return the bytes of each wanted part at a moment."""
    parts = dict.fromkeys((part for part in PARTS if part in wanted), 0.0)
    for allocation in timeline.at(moment):
        if allocation.kind in wanted:
            parts[allocation.kind] += allocation.num_bytes
    return parts
