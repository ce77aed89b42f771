"""Runs from the command line: two ranks train what one does, whatever the micro-batch."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.data import write_parquet
from tests.support.runs import finish, read_metrics, rows, series, start, status, train_here, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


EPOCHS = "trainer.total_epochs=2"
"""Ten steps: two ranks must agree on a second order of the rows as well."""


@pytest.fixture(scope="module")
def one(inputs: Path) -> list[dict[str, Any]]:
    return train_here(inputs, inputs / "one", EPOCHS)


def check_like(one: list[dict[str, Any]], inputs: Path, out: Path) -> None:
    """Metrics and model of the run in `out` are those of one process."""
    metrics = read_metrics(out)
    for name in ("step", "train/lr", "train/targets", "train/tokens", "train/epoch", "val/targets"):
        assert series(metrics, name) == series(one, name), name
    for name, bound in (("train/loss", 1e-5), ("val/loss", 1e-5), ("train/grad_norm", 1e-4)):
        assert series(metrics, name) == pytest.approx(series(one, name), rel=bound, abs=0), name
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, inputs / "one"))
    assert found.keys() == expected.keys()
    assert max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected) < 1e-4


@pytest.mark.parametrize(
    ("processes", "micro_batch_size"),
    [(2, 1), (2, 4), pytest.param(4, 3, marks=pytest.mark.long), pytest.param(3, 1, marks=pytest.mark.long)],
)
def test_ranks_and_micro_batches_do_not_show(
    inputs: Path, one: list[dict[str, Any]], tmp_path: Path, processes: int, micro_batch_size: int
) -> None:
    more = [EPOCHS, f"data.micro_batch_size_per_gpu={micro_batch_size}"]
    process = start(inputs, tmp_path / "out", *more, processes=processes)
    said = finish(process)
    assert process.returncode == 0, said[-4000:]
    check_like(one, inputs, tmp_path / "out")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_under_fsdp(inputs: Path, one: list[dict[str, Any]], tmp_path: Path, processes: int) -> None:
    """Through its checkpoints, with their own Hugging Face folders."""
    more = [EPOCHS, "model.strategy=fsdp", "trainer.checkpoint.save_contents=[model,optimizer,extra,hf_model]"]
    out = tmp_path / "out"
    process = start(inputs, out, *more, processes=processes)
    said = finish(process)
    assert process.returncode == 0, said[-4000:]
    check_like(one, inputs, out)
    last = out / "checkpoints" / "latest" / "hf" / "model.safetensors"
    assert last.read_bytes() == (out / "model.safetensors").read_bytes()


def test_fewer_rows_than_ranks(inputs: Path, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "one.parquet", rows(1))
    more = [f"data.train_files={file}", f"data.val_files={file}", "trainer.total_training_steps=2"]
    expected = train_here(inputs, tmp_path / "alone", *more)
    process = start(inputs, tmp_path / "out", *more, processes=2)
    said = finish(process)
    assert process.returncode == 0, said[-4000:]
    for name in ("train/loss", "val/loss"):
        assert series(read_metrics(tmp_path / "out"), name) == pytest.approx(series(expected, name), rel=1e-5)
    assert status(tmp_path / "out") == "finished"
