"""One loss, whatever the layout: every cell's loss, gradient norm and gradients equal the oracle's to 1e-12 in fp64.

The whole grid, and its table in the docs: `APOLLO_WRITE_DOCS=1 pytest -m long tests/parity/test_layouts.py`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.layout_grid import ADAPTERS, COVERING, MODELS, Cells, full_grid, layout_of, layouts
from tests.support.documents import section, table
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.ranks import run_ranks
from tests.support.samples import graded_samples, write_store

BOUND = 1e-12
WORKER = Path(__file__).with_name("layout_worker.py")
GRID_SECONDS = 3000
Figure = list[Any]
"""Model, overrides, and the relative differences of the worst gradient, the loss and the gradient norm."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and 32 rows with 0 to 120 targets."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, (family, changes) in MODELS.items():
        save_tiny_model(folder / name, tiny_config(family, **changes))
    for name, settings in ADAPTERS.items():
        save_tiny_adapter(folder / name, **settings)
    write_store(folder / "store", graded_samples(32, 120))
    return folder


def measure(processes: int, cells: Cells, folder: Path, note: Callable[[str], None], seconds: float) -> list[Figure]:
    (folder / "cells.json").write_text(json.dumps(cells))
    figures: list[Figure] = run_ranks(
        WORKER, processes, folder, str(folder), str(folder / "cells.json"), seconds=seconds
    )
    assert len(figures) == sum(map(len, cells.values()))
    worst = max(figures, key=lambda figure: max(figure[2:]))
    note(f"{processes} processes: {len(figures)} layouts, worst {max(worst[2:]):.1e} in {worst[0]} {worst[1]}")
    beyond = [figure for figure in figures if not max(figure[2:]) <= BOUND]
    assert not beyond, f"beyond {BOUND} (gradient, loss, norm): {beyond}"
    return figures


@pytest.mark.parametrize("processes", COVERING)
def test_covering_cells(processes: int, folder: Path, note: Callable[[str], None]) -> None:
    measure(processes, COVERING[processes], folder, note, seconds=300)


GRIDS = {"grid": [name for name in MODELS if name not in ADAPTERS], "grid of adapters": list(ADAPTERS)}
"""The parts of the docs: full fine-tuning, and LoRA."""


@pytest.mark.long
@pytest.mark.timeout(4 * GRID_SECONDS)
@pytest.mark.parametrize("part", GRIDS)
def test_full_grid(part: str, folder: Path, note: Callable[[str], None]) -> None:
    by_layout: dict[Any, list[Figure]] = {}
    by_model: dict[Any, list[Figure]] = {}
    for processes in (1, 2, 4, 8):
        cells = {name: found for name, found in full_grid(processes).items() if name in GRIDS[part]}
        for figure in measure(processes, cells, folder, note, GRID_SECONDS):
            by_layout.setdefault(layout_of(processes, figure[1]), []).append(figure)
            by_model.setdefault(figure[0], []).append(figure)
    wanted = [layout for processes in (1, 2, 4, 8) for layout in layouts(processes)]
    assert set(by_layout) == set(wanted)
    text = table(
        ["dp x sp", "strategy", *COLUMNS],
        ([f"{dp} x {sp}", name, *summary(by_layout[dp, sp, name])] for dp, sp, name in wanted),
    )
    text += "\n" + table(["model", *COLUMNS], ([name, *summary(figures)] for name, figures in by_model.items()))
    every = [figure for figures in by_model.values() for figure in figures]
    cells, *worst = summary(every)
    text += f"\nIn all {cells} layouts; the worst figures: gradient {worst[0]}, loss {worst[1]}, norm {worst[2]}.\n"
    assert counts(section("layouts.md", part, text)) == counts(text), "write it anew: APOLLO_WRITE_DOCS=1"


COLUMNS = ["layouts", "gradient", "loss", "gradient norm"]


def summary(figures: Iterable[Figure]) -> list[str]:
    """How many there are, and the worst of each difference."""
    listed = list(figures)
    return [str(len(listed)), *(f"{max(figure[i] for figure in listed):.0e}" for i in (2, 3, 4))]


def counts(text: str) -> list[list[str]]:
    """The cells of each row that do not depend on rounding."""
    return [[cell for cell in line.split("|") if "e-" not in cell] for line in text.splitlines() if "|" in line]
