"""No document sees another by a single bit, alone or cut over two ranks; no target is lost at a document's edge."""

import json
from pathlib import Path

import pytest
import torch

from apollo_sft.data.batch.loader import pack
from apollo_sft.types import IGNORE_INDEX
from tests.support.ranks import run_ranks
from tests.support.samples import random_samples

WORKER = Path(__file__).with_name("isolation_worker.py")
FEW = ["Llama", "Mistral", "Gemma 2"]
"""Full attention, a sliding window, and scores that are written out."""
MORE = ["Qwen2, window in some layers", "Qwen3", "Gemma 3", "Phi-3", "SmolLM3", "Granite", "OLMo 2", "GLM-4", "GPT-2"]


def check(names: list[str], folder: Path) -> None:
    found = run_ranks(WORKER, 2, folder, json.dumps(names))
    assert len(found) == len(names) * 4
    assert {tokens for tokens, _ in found.values()} == {32}
    leaks = {case: leaked for case, (_, leaked) in found.items() if leaked}
    assert not leaks, f"tokens that changed another document, or not their own: {leaks}"


def test_a_token_changes_its_own_document_only(tmp_path: Path) -> None:
    check(FEW, tmp_path)


@pytest.mark.long
def test_a_token_changes_its_own_document_only_in_more_architectures(tmp_path: Path) -> None:
    check(MORE, tmp_path)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 8])
def test_a_pack_has_the_targets_of_its_samples(multiple: int) -> None:
    samples = random_samples(20, most_targets=7)
    for size in range(1, len(samples) + 1):
        micro_batch = pack(samples[:size], multiple)
        expected = sum(sample.num_targets for sample in samples[:size])
        slices = list(micro_batch.labels.chunk(multiple, dim=1))
        assert len({part.shape for part in slices}) == 1
        assert micro_batch.num_targets == sum(int((part != IGNORE_INDEX).sum()) for part in slices) == expected


def test_the_last_token_of_a_document_never_predicts_the_first_of_the_next() -> None:
    micro_batch = pack(random_samples(20), multiple=4)
    last = micro_batch.document_starts[1:].long() - 1
    assert (micro_batch.labels[0, last] == IGNORE_INDEX).all()
    is_target = micro_batch.labels[0] != IGNORE_INDEX
    following = torch.roll(micro_batch.input_ids[0], -1)
    assert torch.equal(micro_batch.labels[0][is_target], following[is_target])
