"""What `plan` says a rank holds at most, against real steps: bytes of living tensors, by torch's own tracker.

`torch.distributed._tools.mem_tracker.MemTracker` is not ours and counts storages, resized ones too, of real tensors on
real ranks; the plan runs on fake tensors alone. `APOLLO_WRITE_DOCS=1 pytest -m long tests/parity/test_plan.py` writes
the table in the docs.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apollo_sft.config.compose import compose
from apollo_sft.tools.plan.memory import Pack, Ranks, step_memory
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample
from tests.support.documents import section, table
from tests.support.models import save_tiny_model, tiny_config
from tests.support.peaks import needs_a_group, peaks
from tests.support.ranks import run_on_ranks
from tests.support.samples import write_store

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
LARGE = SIZES | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "vocab_size": 16384}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
MODELS = {
    "qwen2-tied": tiny_config("Qwen2", tie_word_embeddings=True, **SIZES),
    "llama-gqa": tiny_config("Llama", tie_word_embeddings=False, num_hidden_layers=5, **SIZES),
    "qwen3-moe": tiny_config("Qwen3Moe", tie_word_embeddings=False, **SIZES, **EXPERTS),
}
LENGTHS = (100, 200, 188, 24)
CHECKPOINTING = "model.enable_gradient_checkpointing=true"
SELECTIVE = "model.gradient_checkpointing_policy=selective"
SP = "ulysses_sequence_parallel_size=2"
LORA = ["model.lora_rank=8"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, []),
    "2 ranks, fsdp2, bf16": (2, ["model.fsdp_config.dtype=bf16"]),
    "sp 2, checkpointing": (2, [SP, CHECKPOINTING]),
    "2 ranks, selective checkpointing, LoRA": (2, [CHECKPOINTING, SELECTIVE, *LORA]),
}
MORE: dict[str, tuple[int, list[str]]] = {
    "1 rank, checkpointing": (1, [CHECKPOINTING]),
    "2 ranks, fsdp": (2, ["model.strategy=fsdp"]),
    "2 ranks, offload": (2, ["model.fsdp_config.cpu_offload=true"]),
    "2 ranks, no_sync, no reshard": (
        2,
        [
            "model.fsdp_config.use_no_sync_for_gradient_accumulation=true",
            "model.fsdp_config.reshard_after_forward=false",
        ],
    ),
    "2 ranks, DoRA": (2, [*LORA, "model.use_dora=true", "model.target_modules=[q_proj,k_proj,v_proj,o_proj]"]),
    "4 ranks, HSDP 2 x 2, sp 2": (4, [SP, "model.fsdp_config.fsdp_size=2"]),
}
ALL = LAYOUTS | MORE
Cell = tuple[str, str]
"""A model and a layout."""


def documents(lengths: tuple[int, ...] = LENGTHS, vocab_size: int = SIZES["vocab_size"]) -> list[Sample]:
    """All tokens but the last of each document predict the next one."""
    rng = np.random.default_rng(0)
    samples = []
    for row, tokens in enumerate(lengths):
        ids = rng.integers(3, vocab_size, tokens).astype(np.int32)
        samples.append(Sample(ids, np.append(ids[1:], np.int32(IGNORE_INDEX)), RowRef("rows", row), (1,)))
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("plan")
    write_store(folder / "store", documents())
    for name, config in MODELS.items():
        save_tiny_model(folder / name, config)
    return folder


def measured(folder: Path, cells: list[Cell]) -> dict[Cell, int]:
    """Most bytes of rank 0."""
    found: dict[Cell, int] = {}
    for size in sorted({ALL[layout][0] for _, layout in cells}):
        mine = [cell for cell in cells if ALL[cell[1]][0] == size]
        keys = [[model, *ALL[layout][1]] for model, layout in mine]
        most: list[int] = run_on_ranks(peaks, size, folder, keys, needs_group=needs_a_group(keys))[0]
        found |= dict(zip(mine, most, strict=True))
    return found


def planned(folder: Path, model: str, ranks: int, keys: list[str]) -> int:
    base = ["data.train_files=none", "data.val_files=null", f"model.partial_pretrain={folder / model}"]
    config = compose([*base, *keys]).config
    sp = config.ulysses_sequence_parallel_size
    tokens = sum(LENGTHS) // sp
    first_slice = np.concatenate([sample.labels for sample in documents()])[:tokens]
    pack = Pack(LENGTHS, int((first_slice != IGNORE_INDEX).sum()))
    return step_memory(config, MODELS[model], Ranks(ranks, on_cuda=False), pack, 2).total


def compared(folder: Path, cells: list[Cell]) -> list[list[str]]:
    """Rows of the table. Raises: AssertionError when a plan is off by more than a tenth."""
    rows = []
    for (model, layout), peak in sorted(measured(folder, cells).items()):
        plan = planned(folder, model, *ALL[layout])
        assert plan == pytest.approx(peak, rel=0.1), (model, layout)
        rows.append([model, layout, f"{plan:,}", f"{peak:,}", f"{plan / peak:.3f}"])
    return rows


@pytest.mark.long
def test_a_plan_is_within_a_tenth_of_what_real_steps_hold(folder: Path) -> None:
    cells = [(model, layout) for i, model in enumerate(MODELS) for layout in (list(LAYOUTS) * 2)[i : i + 2]]
    assert {layout for _, layout in cells} == set(LAYOUTS)
    compared(folder, cells)


@pytest.mark.long
def test_so_it_is_for_every_model_in_every_layout(folder: Path) -> None:
    rows = compared(folder, [(model, layout) for model in MODELS for layout in ALL])
    text = table(["model", "layout", "planned (bytes)", "measured", "ratio"], rows)
    assert section("plan.md", "accuracy", text) == text, "write it anew: APOLLO_WRITE_DOCS=1"


@pytest.mark.long
@pytest.mark.parametrize(
    "keys",
    [[], [CHECKPOINTING, *LORA]],
    ids=["plain", "checkpointing, LoRA"],
)
@pytest.mark.parametrize("tokens", [8, 512])
def test_layers_and_chunks_that_do_not_run_are_counted_right(folder: Path, keys: list[str], tokens: int) -> None:
    """Ten layers of two kinds, and a head of several chunks, run whole and run in part."""
    base = ["data.train_files=none", "data.val_files=null", f"model.partial_pretrain={folder / 'llama-gqa'}"]
    config = compose([*base, *keys]).config
    sizes = SIZES | {"num_hidden_layers": 10, "vocab_size": 2**18}  # chunks of 64 targets
    hf_config = tiny_config("Qwen3Moe", tie_word_embeddings=False, mlp_only_layers=[0, 4], **sizes, **EXPERTS)
    pack, ranks = Pack((tokens // 2,) * 2, tokens), Ranks(2, on_cuda=True)
    part = step_memory(config, hf_config, ranks, pack, 2)
    whole = step_memory(config, hf_config, ranks, pack, 2, repeats=10)
    assert part.when == whole.when
    assert part.total == pytest.approx(whole.total, rel=0.02)
    assert part.parts == pytest.approx(whole.parts, rel=0.1, abs=0.02 * whole.total)


@pytest.mark.long
def test_a_plan_is_within_a_fifth_of_the_growth_of_resident_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more than 1 GiB, in a process of its own, whose malloc gives back what is freed. As glibc is set by default it
    keeps pieces below 32 MiB, and the process grows by about a quarter more than the plan says.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    hf_config = tiny_config("Llama", **LARGE)
    save_tiny_model(tmp_path / "model", hf_config)
    write_store(tmp_path / "store", documents((512,) * 4, LARGE["vocab_size"]))
    worker = Path(__file__).with_name("rss_worker.py")
    out = tmp_path / "grown.json"
    subprocess.run([sys.executable, str(worker), str(out), str(tmp_path)], check=True, timeout=300)
    grown = json.loads(out.read_text())
    config = compose(["data.train_files=none", "data.val_files=null", f"model.partial_pretrain={tmp_path / 'model'}"])
    plan = step_memory(config.config, hf_config, Ranks(1, on_cuda=False), Pack((512,) * 4, 4 * 511), 2)
    assert grown >= 2**30
    assert plan.total == pytest.approx(grown, rel=0.2), f"{plan.total:,} planned, {grown:,} grown"
