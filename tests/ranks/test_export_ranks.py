"""What two ranks under FSDP2 write is what plain transformers opens in another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.exports import CASES, check_exported, logits, open_base
from tests.support.models import tiny_model
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("export")
    return folder, run_ranks(Path(__file__).parent / "export_worker.py", 2, folder)


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
