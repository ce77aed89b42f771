"""One loss, whatever the layout: every cell's loss, gradient norm and gradients equal the oracle's to 1e-12 in fp64.

The whole grid, and its table in the docs: `APOLLO_WRITE_DOCS=1 pytest -m long tests/parity/test_layouts.py`.
"""

import functools
import gc
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, experts, load, lora
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import differences, oracle
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.sharding import needs_group
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from tests.parity.layout_grid import ADAPTERS, COVERING, MODELS, NO_SYNC, Cells, full_grid, layout_of, layouts
from tests.support.documents import section, table
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.oracle import total_norm, whole
from tests.support.ranks import run_on_ranks
from tests.support.samples import graded_samples, write_store

BOUND = 1e-12
GRID_SECONDS = 3000
EXPECTED = "expected.pt"
"""The file in a model's folder with what the oracle gives for it. It is the same on any number of processes."""

Figure = list[Any]
"""Model, overrides, and the relative differences of the worst gradient, the loss and the gradient norm."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, each with what the oracle gives for it, and 32 rows with 0 to 120 targets."""
    folder = tmp_path_factory.mktemp("layouts")
    store = write_store(folder / "store", graded_samples(32, 120))
    for name, (family, changes) in MODELS.items():
        save_tiny_model(folder / name, tiny_config(family, **changes))
        if name in ADAPTERS:
            save_tiny_adapter(folder / name, **ADAPTERS[name])
        torch.save(asdict(ask_oracle(folder / name, store)), folder / name / EXPECTED)
    return folder


@dataclass(frozen=True)
class Expected:
    """What the oracle says of one step of the whole store."""

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    counts: list[int]


@dataclass(frozen=True)
class Cell:
    """A layout by its overrides, and the config of a run with them."""

    overrides: list[str]
    config: SftConfig


def config_of(base: Path, store: SampleStore, overrides: list[str]) -> SftConfig:
    fixed = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null"]
    fixed += [f"data.train_batch_size={len(store)}", "model.fsdp_config.model_dtype=fp64"]
    if (base / "adapter").exists():
        fixed += [f"model.lora_adapter_path={base / 'adapter'}"]
    return compose([*fixed, *overrides]).config


def composed(folder: Path, cells: Cells) -> dict[str, list[Cell]]:
    """The cells of each model with their configs: composed once, and not on every rank."""
    store = SampleStore(folder / "store")
    return {
        name: [Cell(overrides, config_of(folder / name, store, overrides)) for overrides in wanted]
        for name, wanted in cells.items()
    }


def ask_oracle(base: Path, store: SampleStore) -> Expected:
    attention.register(attention.sdpa_kernel)
    model = load.load_with_weights(base, load.read_config(base, False), torch.float64, False)
    if (base / "adapter").exists():
        config = config_of(base, store, []).model
        lora.inject(model, lora.lora_config(config, base.name), torch.float64, str(base / "adapter"))
        for _, outermost in experts.wrapped(model):
            del outermost.forward  # PEFT's own, which adds B A to all experts
    samples = [store[i] for i in range(len(store))]
    loss, gradients = oracle(model, samples)
    counts = [sum(s.num_targets for s in samples), sum(len(s.input_ids) for s in samples), len(samples)]
    return Expected(loss, total_norm(gradients), {name: g.clone() for name, g in gradients.items()}, counts)


mesh_of = functools.cache(build_mesh)
"""Each mesh has threads of its own until the process ends: hundreds of cells share a few."""


def forget_meshes() -> None:
    """Before the process group ends: one that is held on to may abort the process."""
    mesh_of.cache_clear()
    gc.collect()


class Laid:
    """A model under one layout. The rate is 0, so that it serves for many ways to cut the step."""

    def __init__(self, base: Path, store: SampleStore, config: SftConfig, world: World) -> None:
        self.store, self.world = store, world
        self.mesh = mesh_of(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
        self.hf_config = load.read_config(base, False)
        self.model, self.optimizer = assemble(config, base, self.hf_config, world, self.mesh)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def figures(self, config: SftConfig, expected: Expected) -> list[float]:
        """Relative differences of the worst gradient, the loss and the norm."""
        self.model.reduces_once = config.model.fsdp_config.use_no_sync_for_gradient_accumulation
        spec = plan_spec(config.data, config.trainer.seed, self.mesh, self.hf_config)
        batch = Loader(self.store, spec, self.mesh.dp_rank, self.mesh.sp_size).batch(0)
        result = train_step(self.model, self.optimizer, batch, self.world, None)
        assert [batch.num_targets, batch.num_tokens, batch.num_samples] == expected.counts
        named = strategy_of(self.model).as_row_sharded(self.model, gradients=True).causal_lm.named_parameters()
        found = {name: whole(p.grad) for name, p in named if p.requires_grad}
        assert found.keys() == expected.gradients.keys()
        worst = max(difference for _, difference in differences(iter(found.items()), expected.gradients))
        loss, norm = (abs(a - b) / b for a, b in ((result.loss, expected.loss), (result.grad_norm, expected.norm)))
        return [worst, loss, norm]


def of_the_step(override: str) -> bool:
    """Whether the same assembled model serves with and without it."""
    return override.startswith("data.") or override == NO_SYNC


def assembly(cell: Cell) -> list[str]:
    return [override for override in cell.overrides if not of_the_step(override)]


def lay_out(world: World, folder: Path, cells: dict[str, list[Cell]]) -> list[Figure]:
    """On every rank. `cells`: name of a model folder -> its cells."""
    store = SampleStore(folder / "store")
    figures: list[Figure] = []
    for name, wanted in cells.items():
        base = folder / name
        expected = Expected(**torch.load(base / EXPECTED))  # noqa: TID251  # this test has written it
        for _, group in groupby(sorted(wanted, key=assembly), key=assembly):
            same_assembly = list(group)
            config = same_assembly[0].config
            if world.size == 1:
                forget_meshes()
                launch.stop()
                world = launch.start("cpu", needs_group(config.model, on_cuda=False))
            laid = Laid(base, store, config, world)
            figures += [[name, cell.overrides, *laid.figures(cell.config, expected)] for cell in same_assembly]
            del laid
            gc.collect()
            if world.is_main:
                (folder / "figures.json").write_text(json.dumps(figures))  # the long grid can be watched
    forget_meshes()
    return figures


def measure(processes: int, cells: Cells, folder: Path, note: Callable[[str], None], seconds: float) -> list[Figure]:
    figures: list[Figure] = run_on_ranks(lay_out, processes, folder, composed(folder, cells), seconds=seconds)[0]
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
