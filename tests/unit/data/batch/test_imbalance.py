"""How even the work of eight data ranks is on real data: a simulation, by the lengths of its rows."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from apollo_sft.data.batch.plan import PlanSpec, attention_cost, plan, steps_per_epoch
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import StoreRequest, prepare_store
from tests.support.data import data_config

SHARED = Path(__file__).resolve().parents[4].parent / "shared"
DATA_RANKS, BATCH, MOST = 8, 256, 1.05
MOST_ROWS = 3000
"""Of a data set: eleven steps of gsm8k, and all rows of taskmaster4."""

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]


@cache
def lengths(dataset: str, folder: Path) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "smollm2")
    data = data_config(multiturn=True, store_dir=str(folder), max_length=8192)
    paths = [str(SHARED / "data" / dataset / "messages" / "train.parquet")]
    store = prepare_store(
        StoreRequest("train", paths, MOST_ROWS, tokenizer, resolve_template(tokenizer, data), data), print
    )
    return np.array(store.lengths)


def imbalances(found: np.ndarray, **how: object) -> list[float]:
    """Of every step of an epoch but its smaller last one."""
    spec = PlanSpec(BATCH, 4, DATA_RANKS, seed=1, attention_cost=attention_cost(896), **how)
    steps = steps_per_epoch(len(found) // BATCH * BATCH, spec)
    return [plan(found, spec, step).imbalance() for step in range(steps)]


@pytest.mark.parametrize("dataset", ["gsm8k", "taskmaster4"])
def test_balanced_ranks_have_equal_work(
    dataset: str, tmp_path_factory: pytest.TempPathFactory, record_property: object
) -> None:
    found = lengths(dataset, tmp_path_factory.getbasetemp() / "imbalance")
    plain, even = imbalances(found), imbalances(found, balance=True)
    capped = imbalances(found, balance=True, max_tokens=8192)
    print(f"\n{dataset}: {len(found):,} rows, max / mean of {DATA_RANKS} ranks, worst of {len(even)} steps:")
    print(f"  equal counts {max(plain):.3f}, balanced {max(even):.4f}, balanced and token-capped {max(capped):.4f}")
    assert max(even) <= MOST < max(plain)
    assert capped == even
