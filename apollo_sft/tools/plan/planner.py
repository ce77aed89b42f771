"""What `plan` works out: the memory of a rank, the largest micro-batch, a layout that fits, steps, FLOPs and time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from apollo_sft.checkpoint.run_folder.state import num_bytes as checkpoint_bytes
from apollo_sft.config.schema import NEUTRAL, DataConfig, FileSet, SftConfig, Source
from apollo_sft.config.sources import own_paths
from apollo_sft.config.values import value_of, with_values
from apollo_sft.data.batch.plan import steps_per_epoch
from apollo_sft.data.read.files import expand_paths
from apollo_sft.data.read.rows import num_rows
from apollo_sft.errors import DataError, ModelError
from apollo_sft.model.flops import cost_of
from apollo_sft.model.four_bit import num_bytes_read, num_weights
from apollo_sft.model.load import check_architecture, find_model, read_config, with_rows
from apollo_sft.parallel.mesh import Mesh, check_mesh
from apollo_sft.tools.plan.memory import Pack, Ranks, StepMemory, meta_model, step_memory
from apollo_sft.train.base_model import as_files_hold, growth_of
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.optim.build import build_optimizer, state_bytes
from apollo_sft.train.process import load_external_lib

CHECKPOINTING = "model.enable_gradient_checkpointing"
POLICY = "model.gradient_checkpointing_policy"
SP = "ulysses_sequence_parallel_size"
OFFLOAD = "model.fsdp_config.cpu_offload"
MICRO = "data.micro_batch_size_per_gpu"
CAP = "data.max_token_len_per_gpu"
LAYOUT = tuple(name for name in NEUTRAL if name not in (MICRO, CAP))
"""What the memory of a step depends on, besides the size of its micro-batches."""
GRAIN = 256
"""Tokens by which a token cap is looked for."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`memory`: bytes of one GPU, None when it does not matter; `reserve`: of them, kept free for what is not counted.

    `peak`: floating point operations a second of one GPU; `mfu`: the share of them that a training is taken to reach.
    """

    gpus: int
    per_node: int
    on_cuda: bool
    memory: int | None
    reserve: int
    peak: float
    mfu: float

    def holds(self, memory: StepMemory) -> bool:
        return self.memory is None or memory.total + self.reserve <= self.memory


@dataclass(frozen=True, slots=True)
class Model:
    """`active`: parameters that one token passes: not the embedding, and of experts the chosen ones."""

    name: str
    parameters: int
    trained: int
    active: int
    layers: int


@dataclass(frozen=True, slots=True)
class Advice:
    """The first of the layouts `tried` that fits; `keys`: its values that are not the config's, with the largest
    micro-batch. Both None when none does.
    """

    keys: dict[str, Any] | None
    memory: StepMemory | None
    tried: int


@dataclass(frozen=True, slots=True)
class Work:
    """Of the whole training. `samples` of an epoch and `steps` are None when nothing says how many rows there are.

    `tokens` and `flops`: of all steps, or of one when their number is not known.
    """

    samples: int | None
    steps: int | None
    tokens: int
    flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`largest`: the largest value of `size_key` that fits, 0 when 1 does not; None without a memory to fit into.

    `checkpoint_copy`: bytes on the CPU of each rank while a checkpoint is written in the background, `reading`: of rank
    0 while the weights are read.
    """

    model: Model
    memory: StepMemory
    fits: bool
    size_key: str
    size: int
    largest: int | None
    advice: Advice | None
    checkpoint_copy: int
    reading: int
    work: Work


class Planner:
    """Works out one config on one machine.

    Raises: ConfigError, ModelError, TopologyError as a training.
    """

    def __init__(self, config: SftConfig, machine: Machine) -> None:
        load_external_lib(config.model.external_lib)
        check_mesh(machine.gpus, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
        folder = find_model(config.model.partial_pretrain, weights=False)
        self.config, self.machine = config, machine
        self.ranks = Ranks(machine.gpus, machine.on_cuda)
        try:
            self.hf_config = as_files_hold(folder, config.model)
        except ModelError:  # of weights, which need not be here
            self.hf_config = read_config(folder, config.model.trust_remote_code)
        check_architecture(self.hf_config, config.model.trust_remote_code)
        growth = growth_of(config.model, config.data, folder, self.hf_config)
        if growth is not None:
            self.hf_config = with_rows(self.hf_config, growth.rows)
        self.causal_lm = meta_model(config.model, self.hf_config, self.ranks)
        self._seen: dict[tuple[Any, ...], StepMemory] = {}

    def plan(self) -> Plan:
        data, machine = self.config.data, self.machine
        size = data.max_token_len_per_gpu if data.use_dynamic_bsz else data.micro_batch_size_per_gpu
        assert size is not None, "refused in config.checks"
        memory = self.memory(self.config, size)
        return Plan(
            model=self._model(),
            memory=memory,
            fits=machine.holds(memory),
            size_key=CAP if data.use_dynamic_bsz else MICRO,
            size=size,
            largest=None if machine.memory is None else self._largest(self.config, {size: memory}),
            advice=None if machine.memory is None else self._advice(),
            checkpoint_copy=self._checkpoint_copy(),
            reading=num_bytes_read(self.causal_lm),
            work=self._work(),
        )

    def _checkpoint_copy(self) -> int:
        checkpoint, sharing = self.config.trainer.checkpoint, self.config.model.fsdp_config.fsdp_size
        moments = state_bytes(build_optimizer(self.causal_lm, self.config.optim))
        whole = checkpoint_bytes(self.causal_lm, moments, checkpoint.save_contents) if checkpoint.async_save else 0
        return whole // (self.machine.gpus if sharing == -1 else sharing)

    def memory(self, config: SftConfig, size: int) -> StepMemory:
        """With micro-batches of `size` longest samples, or, where tokens are capped, of `size` tokens a rank."""
        sp, length = config.ulysses_sequence_parallel_size, config.data.max_length
        total = max(size * sp, length) if config.data.use_dynamic_bsz else size * length
        rest = total % length
        lengths = [length] * (total // length) + ([rest] if rest else []) + ([-total % sp] if total % sp else [])
        dp = self.machine.gpus // sp
        forwards = 2 if config.data.train_batch_size > dp * (total // length) else 1
        key = (size, *(value_of(config, name) for name in LAYOUT))
        if key not in self._seen:
            pack = Pack(tuple(lengths), sum(lengths) // sp)
            self._seen[key] = step_memory(config, self.hf_config, self.ranks, pack, forwards)
        return self._seen[key]

    def _largest(self, config: SftConfig, known: dict[int, StepMemory]) -> int:
        """Bytes grow with the size as a straight line, or bend upwards: where a line through two points meets the
        limit is tried first, then whether one more fits, then the middle. `known`: what sizes take, is filled.
        """
        dp_size = self.machine.gpus // config.ulysses_sequence_parallel_size
        least, step, most = _sizes(config.data, dp_size, config.ulysses_sequence_parallel_size)

        def fits(size: int) -> bool:
            if size not in known:
                known[size] = self.memory(config, size)
            return self.machine.holds(known[size])

        if not fits(least):
            return 0
        low, high = least, most + step
        for turn in itertools.count():
            if high - low <= step:
                return low
            line = _guess(known, self.machine, low, high) // step * step
            tried = (line, low + step, low + (high - low) // (2 * step) * step)[turn % 3]
            tried = min(max(low + step, tried), high - step)
            low, high = (tried, high) if fits(tried) else (low, tried)
        raise AssertionError("unreachable")

    def _advice(self) -> Advice:
        tried = 0
        for tried, values in enumerate(self._candidates(), start=1):
            least, *_ = _sizes(self.config.data, self.machine.gpus // values[SP], values[SP])
            key = CAP if self.config.data.use_dynamic_bsz else MICRO
            config = with_values(self.config, values | {key: least})
            known = {least: self.memory(config, least)}
            if self.machine.holds(known[least]):
                largest = self._largest(config, known)
                keys = {k: v for k, v in (values | {key: largest}).items() if v != value_of(self.config, k)}
                return Advice(keys, known[largest], tried)
        return Advice(None, None, tried)

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """First nothing is computed twice; then less memory for the layers, for the tokens, for the weights."""
        wide = max(sp for sp in (1, 2, 4, 8) if self.machine.per_node % sp == 0)
        plain = {SP: 1, CHECKPOINTING: False, OFFLOAD: False}
        full = plain | {CHECKPOINTING: True, POLICY: "full"}
        yield plain
        yield plain | {CHECKPOINTING: True, POLICY: "selective"}
        yield from (full | {SP: sp} for sp in (1, 2, 4, 8) if sp <= wide)
        yield full | {OFFLOAD: True}
        yield full | {OFFLOAD: True, SP: wide}

    def _model(self) -> Model:
        parameters = list(self.causal_lm.parameters())
        cost = cost_of(self.causal_lm)
        return Model(
            name=type(self.causal_lm).__name__,
            parameters=sum(num_weights(self.causal_lm).values()),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            active=cost.active + cost.head,
            layers=self.hf_config.get_text_config().num_hidden_layers,
        )

    def _work(self) -> Work:
        """Every row is taken to be as long as data.max_length, and all of it a target."""
        trainer, data = self.config.trainer, self.config.data
        sp = self.config.ulysses_sequence_parallel_size
        samples = self._rows()
        steps = trainer.total_training_steps
        if samples is not None:
            mesh = Mesh(0, self.machine.gpus // sp, 0, sp, None)
            in_epoch = steps_per_epoch(samples, plan_spec(data, trainer.seed, mesh, self.hf_config))
            steps = steps or trainer.total_epochs * in_epoch
        number = (steps or 1) * data.train_batch_size
        if samples is not None and trainer.total_training_steps is None and not data.drop_last:
            number = samples * trainer.total_epochs
        tokens = number * data.max_length
        flops = number * cost_of(self.causal_lm).of(np.array([data.max_length]), data.max_length)
        seconds = flops / (self.machine.gpus * self.machine.peak * self.machine.mfu)
        return Work(samples, steps, tokens, flops, seconds)

    def _rows(self) -> int | None:
        """From the footers of the files; None when they are not there or not parquet."""
        data = self.config.data
        if data.custom_cls.path is not None:
            return None
        try:
            rows = sum(_rows_of(entry) for entry in data.train_files)
        except DataError:
            return None
        return rows if data.train_max_samples == -1 else min(rows, data.train_max_samples)


def _rows_of(entry: str | FileSet) -> int:
    """Rows that an epoch takes of one entry of data.train_files; of those with weights it is right for all together."""
    if isinstance(entry, Source) and entry.max_samples is not None:
        return entry.max_samples
    return num_rows(expand_paths(own_paths(entry), "data.train_files"))


def _sizes(data: DataConfig, dp_size: int, sp_size: int) -> tuple[int, int, int]:
    """Return the least micro-batch (one sample), by how much it grows, and the largest of any use: that of a step."""
    samples = -(-data.train_batch_size // dp_size)
    if not data.use_dynamic_bsz:
        return 1, 1, samples
    least = -(-data.max_length // sp_size)
    most = -(-samples * data.max_length // sp_size)
    return least, GRAIN, least + (most - least) // GRAIN * GRAIN


def _guess(known: dict[int, StepMemory], machine: Machine, low: int, high: int) -> int:
    assert machine.memory is not None
    below = sorted(size for size in known if size <= high)[-2:]
    if len(below) < 2:
        return 2 * low
    first, second = (known[size].total for size in below)
    slope = (second - first) / (below[1] - below[0])
    return high if slope <= 0 else int(below[1] + (machine.memory - machine.reserve - second) / slope)
