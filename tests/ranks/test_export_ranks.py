"""What two ranks under FSDP2 write is what plain transformers opens in another process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from apollo_sft.checkpoint.model_folder.write import save_model
from apollo_sft.errors import CheckpointError
from apollo_sft.parallel import fsdp2
from apollo_sft.parallel.launch import World
from tests.support.exports import CASES, base_on_disk, check_exported, logits, open_base, options
from tests.support.models import tiny_model
from tests.support.ranks import run_on_ranks


class Wrapped(nn.Module):
    """The root of the sharding is not the transformers model itself, as in training."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.causal_lm(input_ids=input_ids, use_cache=use_cache)


def sharded(case: str) -> Wrapped:
    config = CASES[case]()
    source = Wrapped(tiny_model(config, torch.float32, seed=1)) if dist.get_rank() == 0 else None
    with torch.device("meta"):
        model = Wrapped(AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager"))
    layers = frozenset(model.causal_lm._no_split_modules)
    spec = fsdp2.ShardSpec(layers, torch.float32, torch.float32, True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if not config.tie_word_embeddings:  # a group of its own, as in training
        fully_shard(model.causal_lm.lm_head, mesh=mesh)
    fsdp2.shard(model, mesh, spec, None)
    fsdp2.fill(model, source, torch.device("cpu"))
    return model


def train_one_step(model: Wrapped) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.arange(2, 30).reshape(1, -1)
    model(ids, False).logits.pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def check_failures(folder: Path, model: Any, base: Any) -> list[str]:
    """A writer that fails early, late and while publishing must not leave the others waiting."""
    messages = []
    blocked = folder / "blocked"
    foreign = folder / "foreign"
    if dist.get_rank() == 0:
        blocked.write_text("a file where the run folder should be")
        foreign.mkdir()
        (foreign / "config.json").write_text("mine")
    dist.barrier()
    broken = object()  # no tokenizer: fails after the weights are written
    for target, chosen in ((blocked, options()), (folder / "late", options(tokenizer=broken)), (foreign, options())):
        try:
            save_model(model, base, target, chosen, dist.get_rank() == 0)
        except CheckpointError as error:
            messages.append(str(error))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, messages)
    return gathered


def export_all(world: World, folder: Path) -> dict[str, Any]:
    """On every rank: every export case under FSDP2: shard from meta, take one step, save."""
    dropped = {}
    for case in CASES:
        if world.is_main:
            base_on_disk(folder / case / "base", case)
        dist.barrier()
        base = open_base(folder / case / "base")
        model = sharded(case)
        train_one_step(model)
        live = logits(model)  # as after a validation: FSDP leaves the root gathered
        shard_bytes = 20_000 if "untied" in case else 5_000_000_000
        result = save_model(
            model.causal_lm, base, folder / case / "out", options(max_shard_bytes=shard_bytes), world.is_main
        )
        assert torch.equal(logits(model), live), "a save must not disturb the model"
        assert world.is_main == bool(result.digests)
        if world.is_main:
            dropped[case] = list(result.dropped)
            save_file({"logits": live.contiguous()}, folder / case / "logits.safetensors")
    return {"dropped": dropped, "failures": check_failures(folder, model.causal_lm, base)}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("export")
    return folder, run_on_ranks(export_all, 2, folder)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_folder_gives_the_live_logits_bit_for_bit(outcome: tuple[Path, Any], case: str) -> None:
    folder = outcome[0] / case
    live = load_file(folder / "logits.safetensors")["logits"]
    check_exported(folder / "out", open_base(folder / "base"), live)
    untrained = tiny_model(CASES[case](), torch.float32, seed=1)
    assert not torch.equal(live, logits(untrained)), "the step must have changed something"
    assert outcome[1]["dropped"][case] == []


def test_a_writer_that_fails_ends_the_run_on_every_rank(outcome: tuple[Path, Any]) -> None:
    writer, other = outcome[1]["failures"]
    assert ["could not be written" in message for message in writer] == [True, True, False]
    assert "config.json" in writer[2]
    assert len(other) == 3
    assert all("the rank that writes it failed" in message for message in other)
