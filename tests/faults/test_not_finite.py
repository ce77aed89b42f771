"""A loss that is not a number ends the run on every rank; it names step and rows, and nothing is poisoned."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apollo_sft.__main__ import main
from apollo_sft.checkpoint.publish import model_files
from tests.support.data import tiny_tokenizer, write_parquet
from tests.support.models import save_tiny_model, tiny_config
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, finish, read_metrics, rows, start, status, write_inputs
from tests.support.samples import random_samples, write_store

WORKER = Path(__file__).with_name("not_finite_worker.py")
BAD_ROW = 29


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row asks with a letter that no other row has; the base's embedding of it is infinite."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    table = rows(40)
    table[BAD_ROW]["question"] = "Z"
    write_parquet(folder / "train.parquet", table)
    (token,) = tiny_tokenizer()("Z")["input_ids"]
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][token, 3] = float("inf")
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(inputs: Path, out: Path, said: str) -> None:
    last = len(read_metrics(out))
    assert f"apollo-sft: step {last + 1}: the loss or its gradient is not finite" in said
    assert f"{inputs}/train.parquet row {BAD_ROW}" in said
    assert said.count("is not finite") == 1
    assert status(out) == "failed"
    assert not model_files(out)
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.safetensors"))
    assert all(record["train/loss"] < 100 for record in read_metrics(out))


def test_one_process(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments(inputs, tmp_path / "out", "data.micro_batch_size_per_gpu=1"))
    said = capsys.readouterr().err
    assert code == 1
    check(inputs, tmp_path / "out", said)
    assert said.partition("is not finite")[2].count("parquet row") == 1, "a micro-batch of one row names it alone"


def test_two_processes(inputs: Path, tmp_path: Path) -> None:
    process = start(inputs, tmp_path / "out", processes=2)
    said = finish(process)
    assert process.returncode == 1, said[-4000:]
    check(inputs, tmp_path / "out", said)


@pytest.mark.parametrize("processes", [1, 2])
def test_no_weight_changes_on_any_rank(tmp_path: Path, processes: int) -> None:
    folder = save_tiny_model(tmp_path / "model", tiny_config("Llama"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][96, 3] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    samples = random_samples(8, vocab_size=96)
    samples[6].input_ids[0] = 96
    write_store(tmp_path / "store", samples)
    ranks = run_ranks(WORKER, processes, tmp_path, str(tmp_path))
    assert len(ranks) == processes
    for rank in ranks:
        assert rank["healthy"] > 0
        for case in ("loss", "gradient"):
            assert rank[case]["changed"] == []
            assert rank[case] == ranks[0][case], "all ranks say the same"
    assert "step 2: " in ranks[0]["loss"]["message"]
    assert "rows: rows row 6\n" in ranks[0]["loss"]["message"]
    assert "step 1: " in ranks[0]["gradient"]["message"]
    named = ranks[0]["gradient"]["message"]
    assert [row for row in range(8) if f"rows row {row}" in named] == [0, 1, 2, 3], "any of the step's rows may be it"
