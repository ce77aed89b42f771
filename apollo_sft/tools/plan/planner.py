"""Compute what `plan` shows: the memory of a rank, the largest micro-batch, a layout that fits, steps, FLOPs, time."""

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
from apollo_sft.train.base_model import as_files_hold, new_tokens_of
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
"""Keys that the memory of a step depends on, besides the size of its micro-batches."""
GRAIN = 256
"""The largest token cap is searched in steps of so many tokens."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that is planned for."""

    gpus: int
    per_node: int
    on_cuda: bool

    memory: int | None
    """Bytes of one GPU; None when it does not matter."""

    reserve: int
    """Bytes of that which are kept free for what is not counted."""

    peak: float
    """Floating point operations a second of one GPU."""

    mfu: float
    """The share of the peak that a training is assumed to reach."""

    def holds(self, memory: StepMemory) -> bool:
        """Return whether a GPU has room for a step."""
        return self.memory is None or memory.total + self.reserve <= self.memory


@dataclass(frozen=True, slots=True)
class Model:
    """The numbers of a model."""

    name: str
    parameters: int
    trained: int

    active: int
    """Parameters that one token passes: not the embedding, and of experts the chosen ones."""

    layers: int


@dataclass(frozen=True, slots=True)
class Advice:
    """The first layout that fits."""

    keys: dict[str, Any] | None
    """Its values that are not the config's, with the largest micro-batch; None when no layout fits."""

    memory: StepMemory | None
    """Its memory; None when no layout fits."""

    tried: int
    """The number of layouts that were tried."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of the whole training."""

    samples: int | None
    """Samples of an epoch; None when the number of rows is not known."""

    steps: int | None
    """Steps of the training; None when neither the keys nor the files give their number."""

    tokens: int
    """Tokens of all steps, or of one when their number is not known."""

    flops: float
    """FLOPs of the same steps."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All that `plan` shows."""

    model: Model
    memory: StepMemory
    fits: bool

    size_key: str
    """The key that sizes the micro-batches."""

    size: int
    """Its value."""

    largest: int | None
    """The largest value that fits, 0 when 1 does not; None without a memory to fit into."""

    advice: Advice | None

    checkpoint_copy: int
    """Bytes on the CPU of each rank while a checkpoint is written in the background."""

    reading: int
    """Bytes on the CPU of rank 0 while the weights are read."""

    work: Work


class Planner:
    """Plans one config on one machine.

    Raises: ConfigError, ModelError, TopologyError as a training.
    """

    def __init__(self, config: SftConfig, machine: Machine) -> None:
        load_external_lib(config.model.external_lib)
        check_mesh(machine.gpus, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
        folder = find_model(config.model.partial_pretrain, weights=False)
        self.config = config
        self.machine = machine
        self.ranks = Ranks(machine.gpus, machine.on_cuda)
        try:
            self.hf_config = as_files_hold(folder, config.model)
        except ModelError:  # of weights, which need not be here
            self.hf_config = read_config(folder, config.model.trust_remote_code)

        check_architecture(self.hf_config, config.model.trust_remote_code)
        new_tokens = new_tokens_of(config.model, config.data, folder, self.hf_config)
        if new_tokens is not None:
            self.hf_config = with_rows(self.hf_config, new_tokens.rows)

        self.causal_lm = meta_model(config.model, self.hf_config, self.ranks)
        self._seen: dict[tuple[Any, ...], dict[int, StepMemory]] = {}
        """Memory by size, of each layout."""

    def plan(self) -> Plan:
        """Return the plan."""
        size_key = _size_key(self.config.data)
        size = value_of(self.config, size_key)
        assert size is not None, "refused in config.checks"

        memory = self.memory(self.config, size)
        largest = None
        advice = None
        if self.machine.memory is not None:
            largest = self._largest(self.config)
            advice = self._advice()

        return Plan(
            model=self._model(),
            memory=memory,
            fits=self.machine.holds(memory),
            size_key=size_key,
            size=size,
            largest=largest,
            advice=advice,
            checkpoint_copy=self._checkpoint_copy(),
            reading=num_bytes_read(self.causal_lm),
            work=self._work(),
        )

    def _checkpoint_copy(self) -> int:
        """Return the bytes that a rank copies for a checkpoint in the background: its share of the state."""
        checkpoint = self.config.trainer.checkpoint
        if not checkpoint.async_save:
            return 0

        moments = state_bytes(build_optimizer(self.causal_lm, self.config.optim))
        total = checkpoint_bytes(self.causal_lm, moments, checkpoint.save_contents)

        shards = self.config.model.fsdp_config.fsdp_size
        if shards == -1:
            shards = self.machine.gpus
        return total // shards

    def memory(self, config: SftConfig, size: int) -> StepMemory:
        """Return the memory with micro-batches of `size` longest samples.

        Where tokens are capped, `size` is in tokens of a rank.
        """
        sp = config.ulysses_sequence_parallel_size
        length = config.data.max_length
        known = self._known(config)
        if size in known:
            return known[size]

        total = size * length
        if config.data.use_dynamic_bsz:
            total = max(size * sp, length)  # a sample longer than the cap has a forward of its own

        # Full samples, a cut one, and padding to a multiple of the ranks that share the sequence.
        lengths = [length] * (total // length)
        if total % length:
            lengths.append(total % length)
        if total % sp:
            lengths.append(-total % sp)

        dp = self.machine.gpus // sp
        forwards = 1
        if config.data.train_batch_size > dp * (total // length):
            forwards = 2  # from the second one on there are gradients already; more make no difference

        pack = Pack(tuple(lengths), sum(lengths) // sp)
        known[size] = step_memory(config, self.hf_config, self.ranks, pack, forwards)
        return known[size]

    def _known(self, config: SftConfig) -> dict[int, StepMemory]:
        """Return the memory of the sizes that were measured with this layout. `memory` fills it."""
        layout = tuple(value_of(config, name) for name in LAYOUT)
        return self._seen.setdefault(layout, {})

    def _largest(self, config: SftConfig) -> int:
        """Return the largest size that fits; 0 when none does.

        Bytes grow with the size as a straight line, or bend upwards. So three guesses take turns: the size where a line
        through two known points meets the limit, one step above the largest that fits, and the middle.
        """
        dp_size = self.machine.gpus // config.ulysses_sequence_parallel_size
        least, step, most = _sizes(config.data, dp_size, config.ulysses_sequence_parallel_size)

        def fits(size: int) -> bool:
            return self.machine.holds(self.memory(config, size))

        if not fits(least):
            return 0

        # `low` fits, `high` does not, or is more than a step can use.
        low = least
        high = most + step
        for turn in itertools.count():
            if high - low <= step:
                return low
            line = _guess(self._known(config), self.machine, low, high) // step * step
            tried = (line, low + step, low + (high - low) // (2 * step) * step)[turn % 3]
            tried = min(max(low + step, tried), high - step)
            if fits(tried):
                low = tried
            else:
                high = tried

        raise AssertionError("unreachable")

    def _advice(self) -> Advice:
        tried = 0
        for tried, values in enumerate(self._candidates(), start=1):
            least, *_ = _sizes(self.config.data, self.machine.gpus // values[SP], values[SP])
            key = _size_key(self.config.data)
            config = with_values(self.config, values | {key: least})
            if self.machine.holds(self.memory(config, least)):
                largest = self._largest(config)
                keys = {k: v for k, v in (values | {key: largest}).items() if v != value_of(self.config, k)}
                return Advice(keys, self.memory(config, largest), tried)

        return Advice(None, None, tried)

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """Yield layouts from the fastest on.

        First nothing is computed twice; then less memory for the layers, for the tokens, for the weights.
        """
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
        """Return the work when every row is as long as data.max_length, and all of it a target."""
        trainer = self.config.trainer
        data = self.config.data
        sp = self.config.ulysses_sequence_parallel_size
        samples = self._rows()
        steps = trainer.total_training_steps
        if samples is not None:
            mesh = Mesh(0, self.machine.gpus // sp, 0, sp, None)
            in_epoch = steps_per_epoch(samples, plan_spec(data, trainer.seed, mesh, self.hf_config))
            steps = steps or trainer.total_epochs * in_epoch

        # The last step of an epoch may be smaller: then samples are counted, not steps.
        number = (steps or 1) * data.train_batch_size
        if samples is not None and trainer.total_training_steps is None and not data.drop_last:
            number = samples * trainer.total_epochs

        tokens = number * data.max_length
        flops = number * cost_of(self.causal_lm).of(np.array([data.max_length]), data.max_length)
        seconds = flops / (self.machine.gpus * self.machine.peak * self.machine.mfu)
        return Work(samples, steps, tokens, flops, seconds)

    def _rows(self) -> int | None:
        """Return the rows of an epoch, from the footers of the files; None when there are none, or not in parquet."""
        data = self.config.data
        if data.custom_cls.path is not None:
            return None

        try:
            rows = sum(_rows_of(entry) for entry in data.train_files)
        except DataError:
            return None

        if data.train_max_samples == -1:
            return rows
        return min(rows, data.train_max_samples)


def _size_key(data: DataConfig) -> str:
    """Return the key that sizes micro-batches."""
    if data.use_dynamic_bsz:
        return CAP
    return MICRO


def _rows_of(entry: str | FileSet) -> int:
    """Return the rows that an epoch takes of one entry of data.train_files.

    For entries with weights only the sum over all entries is right.
    """
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
    """Return the size where a line through the two largest known sizes up to `high` meets the limit."""
    assert machine.memory is not None
    below = sorted(size for size in known if size <= high)[-2:]
    if len(below) < 2:
        return 2 * low

    first, second = (known[size].total for size in below)
    slope = (second - first) / (below[1] - below[0])
    if slope <= 0:
        return high
    return int(below[1] + (machine.memory - machine.reserve - second) / slope)
