"""Bases whose config.json and files disagree on the head: the files decide, on every rank, and the folder says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apollo_sft.config.compose import compose
from apollo_sft.errors import ModelError
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.check_model import check_model
from tests.support.disagreeing import HEAD, as_the_files_say, write_disagreeing, write_with_a_float32_buffer
from tests.support.oracle import oracle_loss
from tests.support.ranks import run_ranks
from tests.support.samples import random_samples, write_store

WORKER = Path(__file__).with_name("disagreeing_worker.py")
UNTIED = ("ties-two", "ties-vision-two")
KINDS = (*UNTIED, "ties-equal", "ties-head", "unties-two", "unties-equal")
LAYOUTS = [
    ["model.strategy=fsdp2"],
    ["model.strategy=fsdp"],
    ["model.strategy=fsdp2", "model.lora_rank=2"],
    ["model.strategy=fsdp", "model.lora_rank=2"],
]
ONE_PROCESS = [LAYOUTS[0], LAYOUTS[2]]
"""The strategy changes nothing there."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disagreeing")
    for kind in KINDS:
        write_disagreeing(folder / kind, kind)
    write_with_a_float32_buffer(folder / "float32-buffer")
    write_store(folder / "store", random_samples(4, vocab_size=90))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """The loss before the first step, of a model that was built from the files by hand."""
    losses = {}
    for kind in KINDS:
        with torch.no_grad(), StaysDouble():  # type: ignore[no-untyped-call]
            total, targets = oracle_loss(as_the_files_say(folder / kind), random_samples(4, vocab_size=90))
        losses[kind] = float(total) / targets
    return losses


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, folder: Path) -> tuple[int, dict[str, Any]]:
    layouts = LAYOUTS if request.param > 1 else ONE_PROCESS
    (folder / "job.json").write_text(json.dumps({"kinds": KINDS, "layouts": layouts}))
    return request.param, run_ranks(WORKER, request.param, folder, str(folder))


def test_every_layout_trains_what_the_files_hold(found: tuple[int, dict[str, Any]], expected: dict[str, float]) -> None:
    figures = {name: cell for name, cell in found[1].items() if not name.startswith("damaged")}
    assert len(figures) == len(KINDS) * len(LAYOUTS if found[0] > 1 else ONE_PROCESS)
    off = {name: abs(cell["loss"] - expected[name.split()[0]]) for name, cell in figures.items()}
    assert {name: value for name, value in off.items() if not value < 1e-10} == {}
    assert expected["ties-two"] != pytest.approx(expected["ties-equal"], rel=1e-3), "the head must matter"


def test_a_shard_that_is_not_what_was_read_stops_every_rank(found: tuple[int, dict[str, Any]]) -> None:
    size, figures = found
    said = {name: cell for name, cell in figures.items() if name.startswith("damaged fsdp")}
    assert len(said) == (2 if size > 1 else 0)
    for messages in said.values():
        assert len(messages) == size
        name = messages[-1].partition(":")[0]  # the last rank's value was changed
        for message in messages:
            assert "do not hold the weights that rank 0 has read" in message
            assert f"tensors differ: {name}" in message


def test_a_buffer_keeps_the_dtype_and_the_values_of_the_files(found: tuple[int, dict[str, Any]], folder: Path) -> None:
    """DeepSeek's routers choose experts by such a buffer: rounded on some ranks, they would choose others."""
    size, figures = found
    if size == 1:
        pytest.skip("one process holds what it has read")
    held = figures["damaged buffer"]["held"]
    assert len(held) == size
    for name, dtype, values in held:
        stored = load_file(folder / "float32-buffer" / "model.safetensors")[name]
        assert dtype == "torch.float32"
        assert values == stored.double().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_config_and_files_of_the_written_folder_agree(
    found: tuple[int, dict[str, Any]], folder: Path, kind: str
) -> None:
    size, figures = found
    for values in LAYOUTS[:2] if size > 1 else ONE_PROCESS[:1]:
        name = f"{kind} {' '.join(values)}"
        assert bool(figures[name]["untied"]) == (kind in UNTIED)
        out = folder / f"{size} {name}"
        weights, before = (load_file(path / "model.safetensors") for path in (out, folder / kind))
        raw = json.loads((out / "config.json").read_text())
        is_tied = kind in ("ties-equal", "ties-head")
        assert raw["tie_word_embeddings"] is raw.get("text_config", raw)["tie_word_embeddings"] is is_tied
        once = {HEAD} if kind == "ties-equal" else set()
        assert weights.keys() == before.keys() - once
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == is_tied


def test_a_head_that_the_files_lack_is_refused_by_name(tmp_path: Path) -> None:
    write_disagreeing(tmp_path / "base", "unties-one")
    keys = [f"model.partial_pretrain={tmp_path / 'base'}", "data.train_files=none", "data.val_files=null"]
    with pytest.raises(ModelError) as caught:
        check_model(compose([*keys, f"trainer.default_local_dir={tmp_path / 'out'}"]).config)
    message = str(caught.value)
    assert "config.json says that the head is a weight of its own" in message
    assert "no lm_head.weight in the files" in message
    assert "tie_word_embeddings=true in config.json" in message
