"""What a rank holds during a step: the real step, run on tensors that have shapes but no memory, and counted.

The model, the sharding, the head, the optimizer and the step are those of a training. Weights are fake tensors, the
other ranks a process group that answers nothing: so a model of any size on any number of ranks takes seconds. Layers
that are alike run a few times and are counted as often as the model has them.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
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
from apollo_sft.train.assemble import (
    head_exchange,
    needs_group,
    offloads,
    optimizer_of,
    shard_model,
    stored_dtype,
)
from apollo_sft.train.optim.build import fill_state
from apollo_sft.train.precision import DTYPES, resolve_precision
from apollo_sft.train.step import train_step
from apollo_sft.types import MicroBatch

PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "optimizer state"
KEPT, WORKING, GATHERED, UPDATE = "activations", "working memory", "gathered weights", "update"
PARTS = (PARAMETERS, GRADIENTS, STATE, KEPT, HEAD, GATHERED, WORKING, UPDATE)
NAMES = {LAYERS: WORKING, SHARDING: GATHERED, OPTIMIZER: UPDATE}
OFFLOADED = frozenset({PARAMETERS, GRADIENTS, STATE, UPDATE})
FORWARD, LATE, EARLY, LAST = "forward", "backward of the last layer", "backward of the other layers", "update"
HOST = "host"
CPU = torch.device("cpu")
REPEATS = 3
"""Layers of each kind, and chunks of the head, that run; one more is run to see what each of the others takes."""
MICRO_BATCHES = 2
"""Of a step: in the second one, gradients are there already."""

Kind = tuple[Any, ...]
Parts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward of a sequence group: documents of `lengths` tokens. `targets`: of one rank's slice of it."""

    lengths: tuple[int, ...]
    targets: int


@dataclass(frozen=True, slots=True)
class Ranks:
    """`size`: all of them. `on_cuda`: what is planned for; what runs here is the same code on CPU tensors."""

    size: int
    on_cuda: bool


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one rank at the moment of the step, `when`, at which it holds most. `host`: on the CPU, by offload."""

    when: str
    parts: Parts
    host: Parts

    @property
    def total(self) -> int:
        return round(sum(self.parts.values()))


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What depends on values, which are not there: any number is 1, a mask has as many places as there are targets."""

    def __init__(self, targets: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.targets = targets

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self.targets, args[0].ndim), dtype=torch.int64)
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return func(*(a.to(torch.bfloat16) for a in args[:2]), *args[2:], **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def step_memory(
    config: SftConfig, hf_config: Any, ranks: Ranks, pack: Pack, micro_batches: int, repeats: int = REPEATS
) -> StepMemory:
    """Of a step over `micro_batches` of `pack`, in a run that has an optimizer state. `repeats`: see `REPEATS`.

    Raises: ConfigError, ModelError, TopologyError as a training.
    """
    config = config.model_copy(update={"model": _with_dtype(config.model, ranks)})
    kinds = _kinds(meta_model(config.model, hf_config, ranks))
    few = {kind: min(number, repeats) for kind, number in kinds.items()}
    chunk = chunk_rows(hf_config.get_text_config().hidden_size)
    short = replace(pack, targets=min(pack.targets, repeats * chunk))
    step = _Step(config, hf_config, ranks, short, min(MICRO_BATCHES, micro_batches))
    first = step.peaks(few)
    whole = {when: dict(parts) for when, parts in first.items()}
    for kind, number in kinds.items():
        if number > few[kind]:
            _grow(whole, first, step.peaks(few | {kind: few[kind] + 1}), number - few[kind])
    if pack.targets > short.targets:
        longer = replace(step, pack=replace(short, targets=short.targets + chunk))
        _grow(whole, first, longer.peaks(few), (pack.targets - short.targets) / chunk)
    host = whole.pop(HOST)
    when = max(whole, key=lambda name: sum(whole[name].values()))
    return StepMemory(when, whole[when], host)


def _grow(whole: dict[str, dict[str, float]], first: dict[str, Parts], more: dict[str, Parts], times: float) -> None:
    """Add to `whole`, in place, what `more` has over `first`, so many times."""
    for when, parts in whole.items():
        for part in parts:
            parts[part] += times * (more[when][part] - first[when][part])


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
    """What runs."""

    config: SftConfig
    hf_config: Any
    ranks: Ranks
    pack: Pack
    micro_batches: int

    @property
    def world(self) -> World:
        return World(0, self.ranks.size, 0, CPU)

    def peaks(self, few: Mapping[Kind, int]) -> dict[str, Parts]:
        """Parts at the worst moment of each phase, with so many layers of each kind; and, as HOST, those offloaded."""
        try:
            with _group(self.config.model, self.ranks), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._peaks(few)
        finally:
            attention.register(attention.sdpa_kernel)

    def _peaks(self, few: Mapping[Kind, int]) -> dict[str, Parts]:
        sp_size, fsdp_size = self.config.ulysses_sequence_parallel_size, self.config.model.fsdp_config.fsdp_size
        mesh = build_mesh(self.world, sp_size, fsdp_size)
        causal_lm = meta_model(self.config.model, self.hf_config, self.ranks)
        _keep(causal_lm, few)
        layers = [layer for some in _layer_lists(causal_lm) for layer in some]
        attention.register(self._kernel(), head_exchange(mesh))
        model = SftModel(causal_lm, mesh.sp_rank, mesh.sp_size)
        late = self.config.model.strategy == "fsdp" and self.ranks.size > 1  # it gives memory while it cuts
        if not late:
            model = shard_model(self.config.model, model, self.world, mesh)
        with FakeTensorMode(allow_non_fake_inputs=True), _Answers(self.pack.targets):
            if late:
                model = shard_model(self.config.model, model, self.world, mesh)
                fill_buffers(model, None, CPU)
            else:
                model.to_empty(device="cpu")
            if mesh.shard is None:
                causal_lm.tie_weights()  # where nothing is sharded, memory was given to each of two tied weights
            optimizer = optimizer_of(model, self.config.optim)
            timeline, marks = self._run(model, optimizer, layers[max(0, len(layers) - 2)])
        return _worst(timeline, marks, offloads(self.config.model) and self.ranks.on_cuda)

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
        """The step, recorded, and where its phases begin."""
        fill_state(optimizer)
        with recorded() as timeline:
            timeline.add([*model.parameters(), *model.buffers()], PARAMETERS)
            timeline.add((t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)), STATE)
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
    """A process group in which no one answers."""
    if ranks.size == 1 and not needs_group(model, ranks.on_cuda):
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks.size)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


def _layer_lists(causal_lm: Any) -> list[nn.ModuleList]:
    names = set(causal_lm._no_split_modules or ())
    lists = [module for module in causal_lm.modules() if isinstance(module, nn.ModuleList)]
    return [layers for layers in lists if layers and all(type(layer).__name__ in names for layer in layers)]


def _kind(layer: nn.Module) -> Kind:
    """Layers of one kind hold the same bytes."""
    window = getattr(getattr(layer, "self_attn", None), "sliding_window", None)
    return (type(layer), window, *((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()))


def _kinds(causal_lm: Any) -> Counter[Kind]:
    """How many layers of each kind the model has."""
    return Counter(_kind(layer) for layers in _layer_lists(causal_lm) for layer in layers)


def _keep(causal_lm: Any, few: Mapping[Kind, int]) -> None:
    """Take layers out, in place, until there are so many of each kind."""
    for layers in _layer_lists(causal_lm):
        seen: Counter[Kind] = Counter()
        for index in range(len(layers) - 1, -1, -1):
            kind = _kind(layers[index])
            seen[kind] += 1
            if seen[kind] > few[kind]:
                del layers[index]


def _marks(
    timeline: Allocations, model: SftModel, optimizer: Optimizer, second_last: nn.Module
) -> list[tuple[int, str]]:
    """A list that fills while the step runs: at which event each phase began. Gradients are named as they are there."""
    marks = [(0, FORWARD)]

    def mark(when: str) -> None:
        if marks[-1][1] != when:
            marks.append((timeline.now, when))

    def layer_done(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        hidden = output[0] if isinstance(output, tuple) else output
        if marks[-1][1] == FORWARD and hidden.requires_grad:
            hidden.register_hook(lambda _: mark(EARLY))

    def before_update(*_: Any) -> None:
        timeline.add((p.grad for p in model.parameters() if p.grad is not None), GRADIENTS)
        mark(LAST)

    inner = model.module if isinstance(model, FullyShardedDataParallel) else model
    inner.register_forward_pre_hook(lambda *_: mark(FORWARD))
    inner.register_forward_hook(lambda *_: mark(LATE))
    second_last.register_forward_hook(layer_done)
    optimizer.register_step_pre_hook(before_update)
    return marks


def _worst(timeline: Allocations, marks: list[tuple[int, str]], offloaded: bool) -> dict[str, Parts]:
    away = OFFLOADED if offloaded else frozenset()
    begins = [at for at, when in marks if when == LATE]
    for allocation in timeline.timeline:
        allocation.kind = NAMES.get(allocation.kind, allocation.kind)
        end = timeline.now if allocation.death is None else allocation.death
        if allocation.kind == WORKING and any(allocation.birth <= begin < end for begin in begins):
            allocation.kind = KEPT
    here = timeline.live_bytes(without=away)
    found: dict[str, Parts] = {}
    for phase in (FORWARD, LATE, EARLY, LAST):
        ends = [at for at, _ in marks[1:]] + [timeline.now + 1]
        spans = [slice(at, end) for (at, when), end in zip(marks, ends, strict=True) if when == phase]
        worst = max((span.start + int(here[span].argmax()) for span in spans), key=lambda at: here[at])
        found[phase] = _parts(timeline, worst, set(PARTS) - away)
    everywhere = timeline.live_bytes(without=frozenset(PARTS) - away)
    found[HOST] = _parts(timeline, int(everywhere.argmax()), set(away))
    return found


def _parts(timeline: Allocations, moment: int, wanted: Collection[str]) -> dict[str, float]:
    parts = dict.fromkeys((part for part in PARTS if part in wanted), 0.0)
    for allocation in timeline.at(moment):
        if allocation.kind in wanted:
            parts[allocation.kind] += allocation.num_bytes
    return parts
