"""Loss and targets of each source and of each validation set, on 1, 2 and 4 ranks, against one process written out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_sft.parallel.launch import World
from tests.ranks.sources_worker import figures
from tests.support.models import save_tiny_model, tiny_config
from tests.support.ranks import run_ranks
from tests.support.samples import random_samples, write_store

WORKER = Path(__file__).with_name("sources_worker.py")
NAMES = {"long", "short", "rare"}


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Thirty samples in three sources, of the last one a single one, in the three steps of an epoch of 26."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_model(folder / "model", tiny_config("Qwen2"))
    write_store(folder / "store", random_samples(32)[2:])
    if request.param == 1:
        return figures(folder, World(0, 1, 0, torch.device("cpu")))
    result: dict[str, Any] = run_ranks(WORKER, request.param, folder, str(folder))
    return result


def test_every_source_has_the_loss_of_its_own_targets(found: dict[str, Any]) -> None:
    worst = 0.0
    for name, layout in found["layouts"].items():
        assert len(layout["records"]) == len(found["expected"]) == 4
        for record, expected in zip(layout["records"], found["expected"], strict=True):
            assert record.keys() - {"whole"} == expected.keys() == NAMES
            for source, (loss, targets) in expected.items():
                assert record[source][1] == targets, (name, source)
                worst = max(worst, abs(record[source][0] - loss) / max(loss, 1))
            together = [sum(part) for part in zip(*expected.values(), strict=True)]
            assert record["whole"][1] == together[1]
            worst = max(worst, abs(record["whole"][0] - together[0]) / together[0])
    print(f"\nlosses of sources: worst {worst:.1e}")
    assert worst <= 1e-12
    assert len(found["layouts"]) >= 3


def test_sets_change_nothing_of_the_whole_validation(found: dict[str, Any]) -> None:
    for layout in found["layouts"].values():
        named, plain = layout["val/loss"]
        assert named == plain
        assert layout["of a plain one"] == {}
