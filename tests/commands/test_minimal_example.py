"""examples/minimal_sft.py is the same training as `apollo-sft train`, in few lines."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.minimal_sft import main
from tests.support.runs import read_metrics, series, train_here, write_inputs

ROOT = Path(__file__).resolve().parents[2]


def test_it_gives_the_losses_and_the_weights_of_the_command(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    keys = ("data.train_batch_size=8", "data.micro_batch_size_per_gpu=4", "data.max_length=128", "optim.lr=1e-2")
    store = f"data.store_dir={inputs / 'store'}"
    losses = main(str(inputs / "model"), str(inputs / "train.parquet"), str(tmp_path / "few"), *keys, store)
    train_here(inputs, tmp_path / "whole", "data.val_files=null")
    assert losses == pytest.approx(series(read_metrics(tmp_path / "whole"), "train/loss"), rel=1e-12)
    few, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("few", "whole"))
    assert few.keys() == whole.keys()
    assert all(bool((few[name] == whole[name]).all()) for name in few)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_it_is_short() -> None:
    assert len((ROOT / "examples" / "minimal_sft.py").read_text().splitlines()) <= 150
