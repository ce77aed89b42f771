"""No document sees another by a single bit, alone or cut over two ranks; no target is lost at a document's edge."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from apollo_sft.data.batch.loader import pack
from apollo_sft.model import attention
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.ulysses import Ulysses
from apollo_sft.types import IGNORE_INDEX, MicroBatch
from tests.support.architectures import case_config, documents
from tests.support.models import tiny_model
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples

FEW = ["Llama", "Mistral", "Gemma 2"]
"""Full attention, a sliding window, and scores that are written out."""
MORE = ["Qwen2, window in some layers", "Qwen3", "Gemma 3", "Phi-3", "SmolLM3", "Granite", "OLMo 2", "GLM-4", "GPT-2"]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.no_grad()
def outputs(causal_lm: Any, micro_batch: MicroBatch, input_ids: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """(tokens, hidden size + vocabulary): hidden states and logits of the whole row, on every rank."""
    ids, positions = (whole.chunk(size, dim=1)[rank] for whole in (input_ids, micro_batch.position_ids))
    documents = {"document_starts": micro_batch.document_starts, "longest_document": 13}
    hidden = causal_lm.base_model(input_ids=ids, position_ids=positions, use_cache=False, **documents).last_hidden_state
    mine = torch.cat([hidden, causal_lm.get_output_embeddings()(hidden)], dim=-1)[0].contiguous()
    if size == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)


def changes(causal_lm: Any, rank: int, size: int) -> Iterator[tuple[int, set[int]]]:
    """For every token: the document it is of, and the documents whose outputs it changed."""
    micro_batch = pack(documents(), multiple=2)
    starts = micro_batch.document_starts
    before = outputs(causal_lm, micro_batch, micro_batch.input_ids, rank, size)
    for position in range(micro_batch.input_ids.shape[1]):
        perturbed = micro_batch.input_ids.clone()
        perturbed[0, position] = (perturbed[0, position] + 1) % 97
        after = outputs(causal_lm, micro_batch, perturbed, rank, size)
        changed = (after != before).any(dim=1).nonzero().flatten()
        owners = torch.bucketize(changed, starts, right=True) - 1
        own = int(torch.bucketize(torch.tensor(position), starts, right=True)) - 1
        yield own, set(owners.tolist())


def perturb(world: World, names: list[str]) -> dict[str, list[int]]:
    """On every rank: for every architecture and dtype, how many tokens were perturbed, and what leaked."""
    attention.register(attention.sdpa_kernel)
    found = {}
    for name in names:
        for dtype_name, dtype in DTYPES.items():
            causal_lm = tiny_model(case_config(name), dtype, attention.NAME).eval()
            for ranks in (1, world.size):
                ulysses = Ulysses(dist.group.WORLD, world.rank, world.size) if ranks > 1 else None
                attention.register(attention.sdpa_kernel, ulysses)
                seen = list(changes(causal_lm, world.rank if ranks > 1 else 0, ranks))
                still = sum(changed != {own} for own, changed in seen)
                found[f"{name}, {dtype_name}, sp = {ranks}"] = [len(seen), still]
    return found


def check(names: list[str]) -> None:
    found, _ = run_on_ranks(perturb, 2, names)
    assert len(found) == len(names) * 4
    assert {tokens for tokens, _ in found.values()} == {32}
    leaks = {case: leaked for case, (_, leaked) in found.items() if leaked}
    assert not leaks, f"tokens that changed another document, or not their own: {leaks}"


def test_a_token_changes_its_own_document_only() -> None:
    check(FEW)


@pytest.mark.long
def test_a_token_changes_its_own_document_only_in_more_architectures() -> None:
    check(MORE)


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
