"""What a checkpoint holds, when one is saved, which are kept, and what a run does when one cannot be saved."""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder import state
from apollo_sft.checkpoint.run_folder.resume import check_files, read_facts
from apollo_sft.config.compose import compose
from apollo_sft.errors import AlreadyDone, CheckpointError, ConfigError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import Vote
from apollo_sft.train import saving
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.optim.build import build_optimizer
from tests.support.models import tiny_config, tiny_model
from tests.support.runs import read_metrics, series, status, train_here, without_clock, write_inputs

FOUR = ("trainer.total_training_steps=4", "trainer.save_freq=2", "trainer.test_freq=2")
LORA = ("model.lora_rank=2", "trainer.export=adapter")
ALL = ["model", "optimizer", "extra", "hf_model"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), attention_dropout=0.1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    train_here(inputs, out, *FOUR)
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_holds_the_state_and_a_model_folder(reference: Path) -> None:
    assert names(reference / "checkpoints") == ["latest", "step_000002", "step_000004"]
    assert (reference / "checkpoints" / "latest").readlink() == Path("step_000004")
    last = reference / "checkpoints" / "latest"
    facts = read_facts(last)
    assert (facts["step"], facts["contents"]) == (4, ALL)
    assert facts["best"]["val/loss"] == min(series(read_metrics(reference), "val/loss"))
    assert (last / "hf" / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(last / "hf")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    check_files(last)


def test_with_lora_it_holds_the_adapter(inputs: Path, tmp_path: Path) -> None:
    train_here(inputs, tmp_path, *FOUR, *LORA)
    hf = tmp_path / "checkpoints" / "latest" / "hf"
    tokenizer = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert names(hf) == ["adapter_config.json", "adapter_model.safetensors", *tokenizer]
    for name in names(hf):
        assert (hf / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    adapted = AutoModelForCausalLM.from_pretrained(hf)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    with pytest.raises(AlreadyDone):
        train_here(inputs, tmp_path, *FOUR, *LORA)


@pytest.mark.parametrize("contents", ["[hf_model]", "[model]", "[model,optimizer,extra]"])
def test_what_it_holds_is_chosen(inputs: Path, tmp_path: Path, contents: str) -> None:
    train_here(inputs, tmp_path, *FOUR, f"trainer.checkpoint.save_contents={contents}")
    last = tmp_path / "checkpoints" / "latest"
    tensors = {name for path in last.glob("*.safetensors") for name in load_file(path)}
    kinds = {name.split("/")[0] for name in tensors}
    expected = {"[hf_model]": set(), "[model]": {"model"}}.get(contents, {"model", "optim", "random"})
    assert kinds == expected
    assert (last / "hf").is_dir() == ("hf_model" in contents)


def test_one_that_cannot_be_gone_on_from_is_passed_over(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = (*FOUR, "trainer.checkpoint.save_contents=[hf_model]")
    train_here(inputs, tmp_path, *keys)
    unfinished(tmp_path)
    train_here(inputs, tmp_path, *keys)
    said = capsys.readouterr().err
    assert "skipped step_000004: trainer.checkpoint.save_contents left out" in said
    assert "from the first step" in said


def test_hf_at_best_and_last_only(inputs: Path, tmp_path: Path) -> None:
    keys = ("trainer.checkpoint.hf_model_at=best_and_last", "trainer.max_ckpt_to_keep=5", "trainer.test_freq=100")
    train_here(inputs, tmp_path, "trainer.total_training_steps=7", "trainer.save_freq=3", *keys)
    held = {path.parent.name for path in (tmp_path / "checkpoints").glob("step_*/hf")}
    assert names(tmp_path / "checkpoints")[1:] == ["step_000003", "step_000006", "step_000007"]
    assert held == {"step_000007"}


def unfinished(out: Path) -> None:
    """As if the run had been killed before the model was handed over."""
    for name in publish.model_files(out):
        (out / name).unlink()
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"status": "running"}))


# ---- another run's checkpoint


def fork(source: Path, *more: str) -> tuple[str, ...]:
    path = source / "checkpoints" / "step_000002"
    return (*FOUR, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={path}", *more)


def test_a_run_begins_at_the_checkpoint_of_another(inputs: Path, reference: Path, tmp_path: Path) -> None:
    metrics = train_here(inputs, tmp_path, *fork(reference))
    assert without_clock(metrics) == without_clock(read_metrics(reference)[2:])
    assert (tmp_path / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    with pytest.raises(AlreadyDone):
        train_here(inputs, tmp_path, *fork(reference))


def test_killed_it_goes_on_from_its_own(
    inputs: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(inputs, tmp_path, *fork(reference))
    unfinished(tmp_path)
    train_here(inputs, tmp_path, *fork(reference))
    assert "from step_000004" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def test_another_config_is_refused_or_listed(
    inputs: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        train_here(inputs, tmp_path, *fork(reference, "optim.lr=1e-3", "data.train_batch_size=5"))
    assert "optim.lr: 0.01 then, 0.001 now" in str(caught.value)
    assert "data.train_batch_size: 8 then, 5 now" in str(caught.value)
    train_here(inputs, tmp_path, *fork(reference, "optim.lr=1e-3", "trainer.resume_with_changes=true"))
    assert "changed since then: optim.lr: 0.01 then, 0.001 now" in capsys.readouterr().err


def test_a_run_does_not_go_back_in_its_own_folder(inputs: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "out", symlinks=True)
    unfinished(tmp_path / "out")
    with pytest.raises(ConfigError, match="its newest complete checkpoint is step_000004"):
        train_here(inputs, tmp_path / "out", *fork(tmp_path / "out"))
    assert "step_000004" in names(tmp_path / "out" / "checkpoints")


def test_a_path_without_a_checkpoint_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no checkpoint"):
        train_here(inputs, tmp_path / "out", *fork(tmp_path))


# ---- the object itself, without a training around it


class Saver:
    """Checkpoints of a tiny model, step by step."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        config = compose(["data.train_files=x", "data.val_files=y", f"trainer.default_local_dir={folder}", *overrides])
        self.model = SftModel(tiny_model(tiny_config("Llama"), torch.float32))
        self.optimizer = build_optimizer(self.model.causal_lm, config.config.optim)
        facts = {"processes": 1, "data": "key", "config": {}}
        self.checkpoints = Checkpoints(config.config.trainer, 100, 1000, facts, True, None)
        self.checkpoints.begin(None, self.model, self.optimizer)
        self.folder = folder / "checkpoints"

    def step(self, step: int, loss: float | None = None, vote: Vote = Vote.NOTHING) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        self.optimizer.step()
        record: dict[str, Any] = {"step": step} | ({} if loss is None else {"val/loss": loss})
        self.checkpoints.after_step(step, record, self.checkpoints.vote() | vote, self.model, self.optimizer)

    def kept(self) -> list[int]:
        self.checkpoints.wait_for_save()
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*"))


@pytest.fixture(params=["true", "false"], ids=["background", "waiting"])
def background(request: pytest.FixtureRequest) -> str:
    return f"trainer.checkpoint.async_save={request.param}"


def test_the_best_is_kept_beside_the_newest(tmp_path: Path, background: str) -> None:
    saver = Saver(
        tmp_path, "trainer.save_best_on=val/loss", "trainer.save_freq=2", "trainer.max_ckpt_to_keep=1", background
    )
    losses = {1: 3.0, 3: 2.0, 5: 2.5, 7: 2.6}
    for step in range(1, 9):
        saver.step(step, losses.get(step))
    assert saver.kept() == [3, 8]
    assert (saver.folder / "best").readlink() == Path("step_000003")
    assert read_facts(saver.folder / "latest")["best"] == {"step": 3, "val/loss": 2.0}


def test_a_validation_that_is_not_the_best_saves_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path, "trainer.save_freq=1000")
    saver.step(1, 2.0)
    assert saver.kept() == []
    assert not (saver.folder / "best").exists()


def test_patience_ends_a_run_and_is_remembered(tmp_path: Path) -> None:
    keys = ("trainer.early_stop_patience=2", "trainer.save_freq=1000")
    saver = Saver(tmp_path, *keys)
    for step, loss in enumerate((3.0, 3.1, 2.9, 3.0), start=1):
        saver.step(step, loss)
        assert not saver.checkpoints.best.out_of_patience()
    saver.step(5, 2.9)
    assert saver.checkpoints.best.out_of_patience()
    assert saver.kept() == [5]
    again = Saver(tmp_path, *keys)
    assert again.checkpoints.begin(saver.folder / "latest", again.model, again.optimizer) == 5
    assert again.checkpoints.best.out_of_patience()


def test_a_run_out_of_patience_hands_over_and_is_complete(inputs: Path, tmp_path: Path) -> None:
    keys = ("trainer.total_training_steps=60", "trainer.test_freq=1", "trainer.early_stop_patience=1", "optim.lr=1.0")
    metrics = train_here(inputs, tmp_path, *keys)
    assert len(metrics) < 60
    assert metrics[-1]["val/loss"] >= min(series(metrics, "val/loss"))
    assert (tmp_path / "model.safetensors").is_file()
    with pytest.raises(AlreadyDone):
        train_here(inputs, tmp_path, *keys)


def test_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    saver = Saver(tmp_path, "trainer.save_freq=30min")
    for step, minutes in ((1, 29), (2, 2), (3, 28), (4, 2)):
        now += 60 * minutes
        saver.step(step)
    assert saver.kept() == [2, 4]


def test_another_rank_s_word_counts(tmp_path: Path) -> None:
    saver = Saver(tmp_path, "trainer.save_freq=30min")
    saver.step(1, vote=Vote.SAVE_DUE)
    saver.step(2, vote=Vote.STOP)
    assert saver.kept() == [1, 2]


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, "trainer.save_freq=1")
    write = saving.write_state

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(saving, "write_state", slowly)
    saver.step(1)
    then = {name: parameter.detach().clone() for name, parameter in saver.model.named_parameters()}
    began = time.monotonic()
    with torch.no_grad():
        for parameter in saver.model.parameters():
            parameter.add_(1)
    assert time.monotonic() - began < 0.3, "training goes on while the save is under way"
    assert not (saver.folder / "latest").exists(), "no pointer before the files are durable"
    saver.checkpoints.wait_for_save()
    files = state.StateFiles(saver.folder / "step_000001")
    for name, value in then.items():
        assert torch.equal(files.read(f"model/{name}"), value)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """While the list holds something, no file can be synced: the disk is full."""
    full: list[bool] = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    yield full
    full.clear()


def fail_and_go_on(saver: Saver, full_disk: list[bool]) -> None:
    saver.step(2)
    deadline = time.monotonic() + 30
    while saver.checkpoints.vote() == Vote.NOTHING:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    full_disk.clear()
    saver.step(3)


def test_a_failed_save_ends_the_run_by_the_next_step(tmp_path: Path, background: str, full_disk: list[bool]) -> None:
    saver = Saver(tmp_path, "trainer.save_freq=1", background)
    saver.step(1)
    saver.checkpoints.wait_for_save()
    full_disk.append(True)
    with pytest.raises(CheckpointError) as caught:
        fail_and_go_on(saver, full_disk)
    message = str(caught.value)
    assert "no room for a checkpoint" in message
    assert str(saver.folder) in message
    assert "bytes free" in message
    assert names(saver.folder) == ["latest", "step_000001"], "what was there is whole, nothing half is left"
    check_files(saver.folder / "latest")


def test_room_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, "trainer.save_freq=1")
    saver.step(1)
    assert saver.kept() == [1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match="1,000 bytes free"):
        saver.step(2)
    assert names(saver.folder) == ["latest", "step_000001"]


def test_a_disk_too_small_is_refused_before_the_model_is_loaded(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ConfigError) as caught:
        train_here(inputs, tmp_path, *FOUR)
    message = str(caught.value)
    needed = int(message.split("expected: ")[1].split(" bytes")[0].replace(",", ""))
    monkeypatch.undo()
    assert f"trainer.default_local_dir={tmp_path}" in message
    assert "attention:" not in capsys.readouterr().err
    train_here(inputs, tmp_path, *FOUR)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert needed == pytest.approx(taken, rel=0.15)


def test_without_memory_for_a_copy_training_waits(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "available_memory", lambda: 1000)
    train_here(inputs, tmp_path, *FOUR)
    assert "training waits while it is written" in capsys.readouterr().err
    check_files(tmp_path / "checkpoints" / "latest")


def test_large_states_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_FILE_BYTES", 20_000)
    saver = Saver(tmp_path, "trainer.save_freq=1")
    saver.step(1)
    assert saver.kept() == [1]
    assert len(list((saver.folder / "latest").glob("*.safetensors"))) > 3
    other = Saver(tmp_path / "other")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    other.checkpoints.begin(saver.folder / "latest", other.model, other.optimizer)
    for mine, theirs in zip(other.model.parameters(), saver.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(other.optimizer.state[mine][moment], saver.optimizer.state[theirs][moment])


def test_a_base_that_is_gone_costs_the_model_folder_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of the step is kept: the same command goes on, and `export` writes the model."""
    shutil.copytree(inputs / "model", tmp_path / "base")
    (tmp_path / "base" / "NOTES.md").write_text("mine")
    keys = (*FOUR, f"model.partial_pretrain={tmp_path / 'base'}")
    write = saving.Saver._publish

    def lost(self: Any, staging: Path, *more: Any) -> None:
        (tmp_path / "base" / "NOTES.md").unlink(missing_ok=True)
        write(self, staging, *more)

    monkeypatch.setattr(saving.Saver, "_publish", lost)
    with pytest.raises(CheckpointError, match=r"can no longer be read: .*NOTES\.md"):
        train_here(inputs, tmp_path / "run", *keys)
    assert names(tmp_path / "run" / "checkpoints") == ["latest", "step_000002"]
    assert not (tmp_path / "run" / "checkpoints" / "step_000002" / "hf").exists()
    monkeypatch.setattr(saving.Saver, "_publish", write)
    (tmp_path / "base" / "NOTES.md").write_text("mine")
    train_here(inputs, tmp_path / "run", *keys)
    assert status(tmp_path / "run") == "finished"
