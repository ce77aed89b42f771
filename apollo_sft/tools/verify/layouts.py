"""List the layouts that `verify` runs: every choice at least once on 1, 2, 4 … processes, and the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from apollo_sft.config.schema import NEUTRAL, SftConfig
from apollo_sft.config.values import value_of

STEPS = 2
"""Steps that each layout runs. The second one starts from weights that AdamW has changed."""

BOUNDS = (1e-12, 1e-9)
"""Largest relative differences that rounding explains: in the first step, and from its update on. AdamW divides by the
size of each gradient, so rounding in the smallest ones grows. A wrong layout is off by far more than either."""

ORACLE_FILE = "oracle.json"
"""Written once the oracle is done."""

SP = "ulysses_sequence_parallel_size"
MICRO = "data.micro_batch_size_per_gpu"
HYBRID = "model.fsdp_config.fsdp_size"
BALANCED = {"data.balance_dp_token": True}
CHECKPOINTING = {"model.enable_gradient_checkpointing": True}
SELECTIVE = {"model.gradient_checkpointing_policy": "selective"}
FSDP1 = {"model.strategy": "fsdp"}
OFFLOAD = {"model.fsdp_config.cpu_offload": True}
NO_SYNC = {"model.fsdp_config.use_no_sync_for_gradient_accumulation": True}
KEEP = {"model.fsdp_config.reshard_after_forward": False}
WORDS = (
    ("selective checkpointing", CHECKPOINTING | SELECTIVE),
    ("checkpointing", CHECKPOINTING | {"model.gradient_checkpointing_policy": "full"}),
    ("offload", OFFLOAD),
    ("no_sync", NO_SYNC),
    ("no reshard", KEEP),
    ("balanced", BALANCED),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to divide the work."""

    name: str
    processes: int

    values: Mapping[str, Any]
    """The values that are changed in the user's config, by key."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one layout, or of the oracle."""

    index: int
    """The place among the layouts of the job; -1 for the oracle."""

    loss: float = 0.0
    """The loss of the first step."""

    grad_norm: float = 0.0
    """The gradient norm of the first step."""

    deviation: float = 0.0
    """The largest relative difference from the oracle."""

    wrong: str = ""
    """The difference that is beyond its bound; empty when none is."""

    error: str = ""
    """Why there are no figures."""


def worlds(ranks: int) -> list[int]:
    """Return the numbers of processes: 1, 2, 4 … up to `ranks`, and `ranks` itself."""
    powers = [2**i for i in range(ranks.bit_length())]
    return sorted({*(size for size in powers if size <= ranks), ranks})


def layouts(config: SftConfig, ranks: int, cap_tokens: int) -> list[Layout]:
    """Return all layouts in the order of processes; the user's own first. `cap_tokens`: of the token-capped ones."""
    capped = {"data.use_dynamic_bsz": True, "data.max_token_len_per_gpu": cap_tokens}
    micro = {MICRO: config.data.micro_batch_size_per_gpu}
    own = {key: value_of(config, key) for key in NEUTRAL}
    found = []
    for processes in worlds(ranks):
        if fits(config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size, processes):
            found.append(Layout(f"yours: {_describe(own, processes)}", processes, {}))
        cells = list(_one(micro, capped))
        if processes > 1:
            cells = list(_several(processes, micro, capped))
        if config.optim.name != "adamw":
            cells = [cell for cell in cells if cell.get("model.strategy") != "fsdp"]  # refused

        for values in (NEUTRAL | cell for cell in cells):
            layout = Layout(_describe(values, processes), processes, values)
            if layout not in found and (processes, values) != (processes, own):
                found.append(layout)

    return found


def fits(sp_size: int, fsdp_size: int, processes: int) -> bool:
    """Return whether the user's own layout can be made of that many processes."""
    return processes % sp_size == 0 and (fsdp_size == -1 or processes % fsdp_size == 0)


def _one(micro: dict[str, Any], capped: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {}
    yield micro
    yield capped
    yield micro | CHECKPOINTING
    yield micro | CHECKPOINTING | SELECTIVE
    yield OFFLOAD | NO_SYNC  # last: it needs a process group, even alone


def _several(processes: int, micro: dict[str, Any], capped: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {}
    yield micro
    for size in range(2, processes + 1):
        if processes % size == 0:
            yield {SP: size} | micro

    yield {SP: processes} | capped | CHECKPOINTING
    yield capped | BALANCED
    yield NO_SYNC
    yield micro | OFFLOAD
    yield micro | CHECKPOINTING | KEEP
    yield FSDP1 | micro
    yield FSDP1 | {SP: processes} | capped | CHECKPOINTING | SELECTIVE
    yield FSDP1 | OFFLOAD | NO_SYNC
    if processes > 2 and processes % 2 == 0:
        yield {HYBRID: processes // 2} | micro
        yield {HYBRID: 2, SP: 2} | NO_SYNC
        yield {HYBRID: 2} | OFFLOAD | capped
        yield FSDP1 | {HYBRID: 2, SP: 2} | micro


def _describe(values: Mapping[str, Any], processes: int) -> str:
    """Return a layout in a few words: `dp 2 x sp 2, HSDP 2, micro 4, offload`."""
    words = []
    sp = values[SP]
    if 1 < sp < processes:
        words.append(f"dp {processes // sp} x sp {sp}")
    elif sp > 1:
        words.append(f"sp {sp}")
    elif processes > 1:
        words.append(f"dp {processes}")

    if processes > 1 and _has(values, FSDP1):
        words.append("FSDP1")
    if values[HYBRID] not in (-1, processes):
        words.append(f"HSDP {values[HYBRID]}")
    if values["data.use_dynamic_bsz"]:
        words.append(f"{values['data.max_token_len_per_gpu']} tokens")
    else:
        words.append(f"micro {values[MICRO]}")

    words += [word for word, choice in WORDS if _has(values, choice)]
    return ", ".join(words)


def _has(values: Mapping[str, Any], choice: Mapping[str, Any]) -> bool:
    return all(values[key] == value for key, value in choice.items())
