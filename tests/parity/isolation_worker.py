"""One process of `test_isolation`: which other documents change by a bit when a token of one is perturbed."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from apollo_sft.data.batch.loader import pack
from apollo_sft.model import attention
from apollo_sft.parallel.ulysses import Ulysses
from apollo_sft.types import MicroBatch
from tests.support.architectures import case_config, documents
from tests.support.models import tiny_model

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


def main(out: Path, names: list[str]) -> None:
    """Writes, for every architecture and dtype: how many tokens were perturbed, and what leaked."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    attention.register(attention.sdpa_kernel)
    found = {}
    for name in names:
        for dtype_name, dtype in DTYPES.items():
            causal_lm = tiny_model(case_config(name), dtype, attention.NAME).eval()
            for ranks in (1, size):
                attention.register(attention.sdpa_kernel, Ulysses(dist.group.WORLD, rank, size) if ranks > 1 else None)
                seen = list(changes(causal_lm, rank if ranks > 1 else 0, ranks))
                still = sum(changed != {own} for own, changed in seen)
                found[f"{name}, {dtype_name}, sp = {ranks}"] = [len(seen), still]
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
