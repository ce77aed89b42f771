"""Fifty AdamW steps in fp32, whole runs from the command line: losses and exported weights of every layout are one's.

The whole table, and its place in the docs: `APOLLO_WRITE_DOCS=1 pytest -m long tests/trajectory/test_fifty_steps.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.data import write_parquet
from tests.support.documents import section, table
from tests.support.runs import NUMBERS, finish, read_metrics, series, start, train_here, write_inputs

LOSS, WEIGHTS = 1e-5, 1e-4
"""Largest relative differences: of the loss of any step, and of any exported tensor (L2)."""
SP2, FSDP1, HYBRID = "ulysses_sequence_parallel_size=2", "model.strategy=fsdp", "model.fsdp_config.fsdp_size=2"
NO_SYNC = "model.fsdp_config.use_no_sync_for_gradient_accumulation=true"
OFFLOAD = "model.fsdp_config.cpu_offload=true"
CAPPED = ["data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=300", "data.balance_dp_token=true"]


def micro(size: int) -> str:
    return f"data.micro_batch_size_per_gpu={size}"


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 rank, micro-batches of 1": (1, [micro(1)]),
    "1 rank, micro-batches of 16": (1, [micro(16)]),
    "1 rank, token-capped": (1, CAPPED),
    "1 rank, checkpointing": (1, ["model.enable_gradient_checkpointing=true"]),
    "1 rank, offload": (1, [OFFLOAD]),
    "2 ranks, fsdp2": (2, []),
    "2 ranks, fsdp2, micro-batches of 1": (2, [micro(1)]),
    "2 ranks, fsdp2, no_sync": (2, [NO_SYNC]),
    "2 ranks, fsdp2, offload": (2, [OFFLOAD]),
    "2 ranks, fsdp2, token-capped, balanced": (2, CAPPED),
    "2 ranks, fsdp": (2, [FSDP1]),
    "2 ranks, fsdp, no_sync, offload": (2, [FSDP1, NO_SYNC, OFFLOAD]),
    "sp 2": (2, [SP2]),
    "sp 2, fsdp, token-capped": (2, [SP2, FSDP1, *CAPPED]),
    "4 ranks, HSDP 2 x 2": (4, [HYBRID, micro(2)]),
    "4 ranks, fsdp, hybrid 2 x 2": (4, [FSDP1, HYBRID]),
    "dp 2 x sp 2": (4, [SP2]),
    "dp 2 x sp 2, HSDP, no_sync": (4, [SP2, HYBRID, NO_SYNC, micro(2)]),
}
SMALL = ["sp 2, fsdp, token-capped", "2 ranks, fsdp2, offload"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 64 rows whose answers have 1 to 40 words."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    rng = np.random.default_rng(5)
    lengths = rng.permutation(np.linspace(1, 40, 64).round().astype(int))
    rows = [
        {"question": " ".join(rng.choice(NUMBERS, 4)), "answer": " ".join(rng.choice(NUMBERS, words))}
        for words in lengths
    ]
    write_parquet(folder / "train.parquet", rows)
    return folder


def keys(num_steps: int) -> list[str]:
    return [
        "data.train_batch_size=16",
        "data.max_length=256",
        "data.val_files=null",
        "optim.lr=1e-4",
        "optim.clip_grad=0.5",
        "trainer.save_freq=1000",
        f"trainer.total_training_steps={num_steps}",
    ]


def run(layout: str, inputs: Path, out: Path, num_steps: int) -> list[dict[str, Any]]:
    processes, more = LAYOUTS[layout]
    process = start(inputs, out, *keys(num_steps), *more, processes=processes)
    said = finish(process)
    assert process.returncode == 0, said[-4000:]
    return read_metrics(out)


def furthest(found: Path, expected: Path) -> float:
    """Of the tensors of two models, relative L2."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    return max(float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items())


def compare(layouts: list[str], inputs: Path, folder: Path, num_steps: int) -> dict[str, tuple[float, float]]:
    """Per layout, the worst difference of a loss and of a weight from those of one rank."""
    expected = train_here(inputs, folder / "one", *keys(num_steps))
    assert min(series(expected, "train/grad_norm")) > 0.5, "every step is clipped"
    assert furthest(inputs / "model", folder / "one") > WEIGHTS * num_steps, "the weights moved"
    figures = {}
    for number, layout in enumerate(layouts):
        out = folder / f"layout-{number}"
        metrics = run(layout, inputs, out, num_steps)
        for name in ("step", "train/targets", "train/tokens", "train/lr"):
            assert series(metrics, name) == series(expected, name), (layout, name)
        pairs = zip(series(metrics, "train/loss"), series(expected, "train/loss"), strict=True)
        figures[layout] = (max(abs(ours / theirs - 1) for ours, theirs in pairs), furthest(out, folder / "one"))
    return figures


def test_a_few_steps(inputs: Path, tmp_path: Path) -> None:
    for layout, (loss, weights) in compare(SMALL, inputs, tmp_path, 6).items():
        assert loss <= LOSS and weights <= WEIGHTS, layout


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_steps(inputs: Path, tmp_path: Path) -> None:
    figures = compare(list(LAYOUTS), inputs, tmp_path, 50)
    rows = [[layout, f"{loss:.0e}", f"{weights:.0e}"] for layout, (loss, weights) in figures.items()]
    text = table(["layout", "loss of any step", "exported weights"], rows)
    worst = [max(found[i] for found in figures.values()) for i in (0, 1)]
    text += f"\nThe worst figures: loss {worst[0]:.0e}, weights {worst[1]:.0e}.\n"
    print(f"\n{text}")
    assert worst[0] <= LOSS and worst[1] <= WEIGHTS
    listed = section("layouts.md", "steps", text)
    assert all(layout in listed for layout in LAYOUTS), "write it anew: APOLLO_WRITE_DOCS=1"
