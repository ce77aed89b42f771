"""`apollo-sft plan` from a config.json alone: what it prints, what it says fits, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.cli import plan
from apollo_sft.cli.main import main
from tests.support.data import write_parquet
from tests.support.models import tiny_config
from tests.support.runs import rows

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_config(tmp_path, num_layers=1)


def save_config(folder: Path, num_layers: int) -> Path:
    config = tiny_config(
        "Qwen2",
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=num_layers,
        **SIZES,
    )
    config.save_pretrained(folder)
    return folder


def run(model: Path, *arguments: str) -> int:
    base = ["data.val_files=null", f"model.partial_pretrain={model}", "data.max_length=64", "data.train_batch_size=32"]
    return main(["plan", *base, *arguments])


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no byte more than five samples need, five fit, six do not, and the search finds five."""
    run(model, "data.micro_batch_size_per_gpu=5", "--gpus", "1", "--json")
    needed = round(sum(figures(capsys)["memory"]["parts"].values()))

    limit = ["--gpus", "1", "--gpu-memory", f"{needed}B", "--reserve", "0"]
    assert run(model, "data.micro_batch_size_per_gpu=5", *limit, "--json") == 0
    assert figures(capsys)["largest"] == 5

    assert run(model, "data.micro_batch_size_per_gpu=6", *limit) == plan.DOES_NOT_FIT
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_advice_names_what_has_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # With a single layer, gradient checkpointing would save nothing.
    model = save_config(tmp_path, num_layers=2)
    limit = ["--gpus", "1", "--gpu-memory", "1.2MiB", "--reserve", "0"]
    # No more than two samples can be in a micro-batch, which keeps the search for the largest one short.
    run(model, "data.train_batch_size=2", "data.micro_batch_size_per_gpu=2", *limit, "--json")
    found = figures(capsys)
    assert not found["fits"]
    assert found["advice"]["keys"]["model.enable_gradient_checkpointing"] is True
    assert sum(found["advice"]["memory"]["parts"].values()) <= found["memory_limit"]


def test_sources_are_counted_as_an_epoch_takes_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those with weights give together what they have together; max_samples is a number."""
    for name, number in (("a", 40), ("b", 10), ("c", 30)):
        write_parquet(tmp_path / f"{name}.parquet", rows(number))
    asked = {"a": "weight:1", "b": "weight:5", "c": "max_samples:7"}
    entries = ",".join(f"{{path:{tmp_path}/{name}.parquet,{what}}}" for name, what in asked.items())
    run(model, f"data.train_files=[{entries}]", "trainer.total_epochs=1", "--json")
    work = figures(capsys)["work"]
    assert (work["samples"], work["steps"]) == (57, 2)


def test_rows_come_from_the_files(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "train.parquet", rows(40))
    run(model, f"data.train_files={tmp_path / 'train.parquet'}", "trainer.total_epochs=3", "--json")
    work = figures(capsys)["work"]
    assert (work["samples"], work["steps"], work["tokens"]) == (40, 6, 3 * 40 * 64)
    assert work["seconds"] == pytest.approx(work["flops"] / (0.4 * 989e12))


def test_without_data_it_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "data.train_files=gone.parquet") == 0
    said = capsys.readouterr().out
    assert "the number of rows is not known" in said
    assert "of all samples" not in said


@pytest.mark.parametrize("argument", ["--gpus=0", "--gpu-memory=lots", "--mfu=2", "--gpu", "--nodes=3"])
def test_what_makes_no_sense_is_refused(model: Path, argument: str) -> None:
    assert run(model, "--peak-tflops=1", *(["--gpus=4"] if "nodes" in argument else []), argument) == 2
