"""What a rank holds falls with the number of sequence ranks: bytes counted tensor by tensor, in fp32.

`APOLLO_WRITE_DOCS=1 pytest tests/parity/test_memory.py` writes the table in the docs.
"""

import gc
from pathlib import Path

import numpy as np
import pytest

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import StepBatch, pack
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import head, load
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.step import train_step
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample
from bench.memory import counted
from tests.support.documents import section, table
from tests.support.models import save_tiny_model, tiny_config
from tests.support.ranks import run_on_ranks
from tests.support.samples import write_store

SIZES = {"vocab_size": 1024, "num_hidden_layers": 4, "max_position_embeddings": 1024}
MODELS = {"MHA": 4, "GQA": 2}
"""Four ranks hold each of two key heads twice."""


def documents() -> list[Sample]:
    """1024 tokens in four documents; all but the last of each predict the next one."""
    rng = np.random.default_rng(0)
    samples = []
    for row, tokens in enumerate((100, 300, 600, 24)):
        ids = rng.integers(0, SIZES["vocab_size"], tokens).astype(np.int32)
        samples.append(Sample(ids, np.append(ids[1:], np.int32(IGNORE_INDEX)), RowRef("rows", row), (1,)))
    return samples


def count_bytes(world: World, folder: Path, names: list[str]) -> dict[str, dict[str, list[int]]]:
    """On every rank: what it holds at sequence sizes 1, 2 and 4 of the same pack.

    One chunk of the head takes all targets, so that the logits a rank forms are the logits it holds.
    """
    head.CHUNK_ROWS = 1024
    store = SampleStore(folder / "store")
    samples = [store[i] for i in range(len(store))]
    figures: dict[str, dict[str, list[int]]] = {}
    for name in names:
        for sp in (1, 2, 4):
            keys = [f"model.partial_pretrain={folder / name}", "data.train_files=none", "data.val_files=null"]
            config = compose([*keys, f"ulysses_sequence_parallel_size={sp}"]).config
            hf_config = load.read_config(folder / name, False)
            model, optimizer = assemble(config, folder / name, hf_config, world, build_mesh(world, sp))
            micro_batch = pack(samples, multiple=sp)
            batch = StepBatch(0, 0, [micro_batch], [[]], 1, micro_batch.num_targets, micro_batch.input_ids.numel())
            with counted(model.causal_lm.base_model, hf_config.vocab_size) as memory:
                train_step(model, optimizer, batch, world, None)
            figures.setdefault(name, {})[str(sp)] = [memory.activations.most, memory.logits.most, memory.all.most]
            del model, optimizer
            gc.collect()
    return figures


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """Model -> sequence ranks -> bytes of activations, of logits, and of all that a step allocates."""
    folder = tmp_path_factory.mktemp("memory")
    write_store(folder / "store", documents())
    for name, kv_heads in MODELS.items():
        save_tiny_model(folder / name, tiny_config("Qwen2", num_key_value_heads=kv_heads, **SIZES))
    found: dict[str, dict[str, list[int]]] = run_on_ranks(count_bytes, 4, folder, list(MODELS))[0]
    return found


@pytest.mark.parametrize("sp", ["2", "4"])
def test_activations_and_logits_fall_as_the_sequence_is_cut(figures: dict[str, dict[str, list[int]]], sp: str) -> None:
    (whole, part), (_, repeated) = ((figures[name]["1"], figures[name][sp]) for name in MODELS)
    for before, after in zip(whole[:2], part[:2], strict=True):
        assert before / after == pytest.approx(int(sp), rel=0.01)
    assert repeated[0] <= part[0], "repeated key heads cost no more than heads of their own"


def test_the_table_in_the_docs_is_current(figures: dict[str, dict[str, list[int]]]) -> None:
    rows = [
        [name, sp, *(f"{count:,} ({count / by_size['1'][i]:.2f})" for i, count in enumerate(counts[:2]))]
        for name, by_size in figures.items()
        for sp, counts in by_size.items()
    ]
    text = table(["model", "sp", "activations (bytes)", "logits (bytes)"], rows)
    assert section("layouts.md", "memory", text) == text, "write it anew: APOLLO_WRITE_DOCS=1"
