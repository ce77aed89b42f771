"""One loss, whatever the layout: every cell's loss, gradient norm and gradients equal the oracle's to 1e-12 in fp64."""

import json
from pathlib import Path

import pytest

from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.ranks import run_ranks
from tests.support.samples import random_samples, write_store

BOUND = 1e-12
WORKER = Path(__file__).with_name("layout_worker.py")

MODELS = {
    "untied": ("Qwen2", {}),
    "tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "nine-heads": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}),
    "window": ("Mistral", {"sliding_window": 5, "num_key_value_heads": 1}),
    "sinks": ("GptOss", {"num_local_experts": 4, "head_dim": 8, "sliding_window": 5}),
    "lora": ("Qwen2", {}),
}
CHECKPOINTING = "model.enable_gradient_checkpointing=true"
NO_SYNC = "model.fsdp_config.use_no_sync_for_gradient_accumulation=true"
OFFLOAD = "model.fsdp_config.cpu_offload=true"
KEEP = "model.fsdp_config.reshard_after_forward=false"
TOKENS = ["data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=70"]
BALANCE = "data.balance_dp_token=true"
LARGE = "model.fsdp_config.wrap_policy.min_num_params=1500"
HYBRID = "model.fsdp_config.fsdp_size=2"


def sp(size: int) -> str:
    return f"ulysses_sequence_parallel_size={size}"


def micro(size: int) -> str:
    return f"data.micro_batch_size_per_gpu={size}"


COVERING = {
    1: {
        "untied": [[micro(1)], [micro(8), CHECKPOINTING], [*TOKENS]],
        "tied": [[micro(3)], [OFFLOAD, NO_SYNC, micro(2)]],
        "window": [[micro(4)]],
        "sinks": [[micro(4)]],
        "lora": [[micro(3), CHECKPOINTING], TOKENS],
    },
    2: {
        "untied": [[micro(1)], [micro(8), NO_SYNC, CHECKPOINTING], [sp(2), micro(2)], [LARGE], [BALANCE, *TOKENS]],
        "tied": [[micro(3), OFFLOAD], [sp(2), NO_SYNC, KEEP], [LARGE]],
        "nine-heads": [[sp(2), *TOKENS]],
        "window": [[sp(2), micro(4)]],
        "sinks": [[sp(2), micro(4)]],
        "lora": [[micro(2)], [sp(2), OFFLOAD], [LARGE, CHECKPOINTING, NO_SYNC]],
    },
    4: {
        "untied": [[sp(4), micro(3)], [sp(2), HYBRID, micro(2), CHECKPOINTING], [HYBRID, OFFLOAD, NO_SYNC]],
        "tied": [[micro(1), BALANCE], [sp(2), *TOKENS, BALANCE, NO_SYNC]],
        "nine-heads": [[sp(4), micro(2)]],
        "lora": [[sp(2), HYBRID, NO_SYNC], [BALANCE, *TOKENS]],
    },
}
"""Processes -> model -> cells; each choice at least once, with others beside it."""


def full_grid(processes: int) -> dict[str, list[list[str]]]:
    """All combinations that make sense, for the long run."""
    batching = [[micro(1)], [micro(2)], [micro(4)], [micro(8)], TOKENS, [BALANCE, *TOKENS]]
    extras: list[list[str]] = [[], [CHECKPOINTING], [NO_SYNC]]
    if processes > 1:
        extras += [[OFFLOAD], [KEEP, NO_SYNC], [LARGE]] + ([[HYBRID], [HYBRID, OFFLOAD]] if processes == 4 else [])
    sizes = [size for size in (1, 2, 4) if size <= processes]
    cells = [[sp(size), *how, *extra] for size in sizes for how in batching for extra in extras]
    others = [[sp(size), *how] for size in sizes for how in (batching[1], batching[5])]
    return {"untied": cells, **{name: others for name in MODELS if name != "untied"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for name, (family, changes) in MODELS.items():
        save_tiny_model(folder / name, tiny_config(family, **changes))
    save_tiny_adapter(folder / "lora")
    write_store(folder / "store", random_samples(16))
    return folder


def check(processes: int, cells: dict[str, list[list[str]]], folder: Path) -> None:
    (folder / "cells.json").write_text(json.dumps(cells))
    figures = run_ranks(WORKER, processes, folder, str(folder), str(folder / "cells.json"))
    assert len(figures) == sum(map(len, cells.values()))
    worst = max(figures, key=lambda figure: max(figure[2:]))
    print(f"\n{processes} processes: {len(figures)} cells, worst {max(worst[2:]):.1e} in {worst[0]} {worst[1]}")
    beyond = [figure for figure in figures if not max(figure[2:]) <= BOUND]
    assert not beyond, f"beyond {BOUND} (gradient, loss, norm): {beyond}"


@pytest.mark.parametrize("processes", COVERING)
def test_covering_cells(processes: int, folder: Path) -> None:
    check(processes, COVERING[processes], folder)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_full_grid(processes: int, folder: Path) -> None:
    check(processes, full_grid(processes), folder)
