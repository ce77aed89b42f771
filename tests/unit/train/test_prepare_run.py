"""What is refused before a weight is read: there are none in the model folder here."""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.errors import ConfigError, DataError, ModelError
from apollo_sft.train.prepare_run import Prepared, prepare
from apollo_sft.train.process import load_external_lib, seed_everything
from tests.support.models import tiny_config
from tests.support.runs import arguments, write_inputs


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return without_weights(write_inputs(tmp_path))


def without_weights(folder: Path) -> Path:
    (folder / "model" / "model.safetensors").unlink()
    return folder


def prepared(inputs: Path, *more: str) -> Prepared:
    return prepare(compose(arguments(inputs, inputs / "out", *more)).config)


def test_rows_become_stores(inputs: Path) -> None:
    found = prepared(inputs)
    assert (len(found.train), len(found.val or [])) == (40, 7)
    assert found.base.config["model_type"] == "qwen2"
    assert prepared(inputs, "data.val_files=null").val is None


def test_rows_are_limited(inputs: Path) -> None:
    found = prepared(inputs, "data.train_max_samples=3", "data.val_max_samples=2")
    assert (len(found.train), len(found.val or [])) == (3, 2)


def test_max_length_above_the_positions(inputs: Path) -> None:
    prepared(inputs, "data.max_length=256")
    with pytest.raises(ConfigError, match=r"data\.max_length is above[^$]*found: *257[^$]*at most 256"):
        prepared(inputs, "data.max_length=257")


def test_token_ids_without_an_embedding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token ids that the model has no embedding for"):
        prepared(without_weights(write_inputs(tmp_path, vocab_size=97)))


def test_an_architecture_that_mixes_documents(inputs: Path) -> None:
    config = inputs / "model" / "config.json"
    config.write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(ModelError, match="MambaForCausalLM cannot be trained exactly here"):
        prepared(inputs)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma", "Llama"])
def test_no_tokenizer(inputs: Path, family: str) -> None:
    """transformers makes an empty one for some architectures, and one that knows <unk> alone for others."""
    tiny_config(family, vocab_size=360).save_pretrained(inputs / "model")
    for file in (inputs / "model").glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer can be loaded from"):
        prepared(inputs)


def test_external_lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_the_user.py").write_text("LOADED = True\n")
    (tmp_path / "of_the_user_too.py").write_text("import no_such_module_at_all\n")
    load_external_lib(None)
    load_external_lib("of_the_user")
    assert sys.modules["of_the_user"].LOADED
    for name in ("of_nobody", "of_the_user_too"):
        with pytest.raises(ConfigError, match=rf"model\.external_lib cannot be imported[^$]*{name}"):
            load_external_lib(name)


def draws(seed: int, rank: int) -> tuple[Any, ...]:
    seed_everything(seed, rank)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_seed_seeds_everything() -> None:
    assert draws(1, 0) == draws(1, 0)
    assert all(one != other for one, other in zip(draws(1, 0), draws(2, 0), strict=True))
    assert draws(1, 0)[2] != draws(1, 1)[2], "ranks draw different dropout masks"
    seed_everything(2**40, 0)
