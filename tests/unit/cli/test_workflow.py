"""`apollo-sft workflow`: what a file and the words after it become, and what is refused before anything runs."""

import shlex
import sys
from pathlib import Path

import pytest

from apollo_sft.cli.main import main
from apollo_sft.cli.workflow import PREPARES

FILE = """
env: {GREETING: hello}
preprocess:
  - module: alphaapollo.data_preprocess.prepare_sft_no_tool
    args:
      data_source: org/math
      local_dir: ./data
      splits: [train, test]
      overwrite: true
      dry_run: false
runner:
  launcher: torchrun
  module: alphaapollo.core.generation.verl.trainer.fsdp_sft_trainer
  torchrun: {standalone: true, nnodes: 1, nproc_per_node: 2}
  overrides:
    - data.train_files=${preprocess.0.args.local_dir}/${preprocess.0.args.data_source}/train.parquet
    - data.val_files=null
    - trainer.logger=['console','wandb']
"""
OURS = [sys.executable, "-m", "apollo_sft.cli.main"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "workflow.yaml"
    path.write_text(FILE)
    return path


def commands(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[list[str]]:
    assert main(["workflow", "--dry-run", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    return [shlex.split(line[2:]) for line in lines]


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["workflow", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == "", "nothing has run"
    return said.err


def test_steps_come_first_and_references_are_resolved(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, train = commands(capsys, file)
    options = ["--data_source", "org/math", "--local_dir", "./data", "--splits", "train", "test", "--overwrite"]
    assert prepare == [*OURS, "prepare", "sft-no-tool", *options]
    assert train[:5] == [*OURS, "train", "--nproc=2"]
    assert train[5:] == [
        "data.train_files=./data/org/math/train.parquet",
        "data.val_files=null",
        "trainer.logger=['console','wandb']",
    ]


def test_overrides_come_last_in_every_spelling(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["optim.lr=1e-4", "--data.max_length=2048", "--trainer.total_epochs", "2"]
    *_, train = commands(capsys, "--config", file, *more)
    assert train[-3:] == ["optim.lr=1e-4", "data.max_length=2048", "trainer.total_epochs=2"]


def test_overrides_of_steps_move_what_refers_to_them(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, train = commands(capsys, file, "preprocess.local_dir=/d", "--preprocess.0.data_source", "other")
    assert prepare[-8:-4] == ["--data_source", "other", "--local_dir", "/d"]
    assert "data.train_files=/d/other/train.parquet" in train


def test_module_and_sources_of_steps(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, _ = commands(
        capsys,
        file,
        "preprocess.alphaapollo.data_preprocess.prepare_sft_no_tool.data_source=x",
        "preprocess.module=alphaapollo.data_preprocess.prepare_sft_tool",
        "preprocess.data_sources=a,b",
    )
    assert prepare[:7] == [*OURS, "prepare", "sft-tool", "--data_source", "x"]
    assert prepare[-3:] == ["--data_sources", "a", "b"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runner.torchrun.nproc_per_node=4"], [*OURS, "train", "--nproc=4"]),
        (["runner.launcher=python"], [*OURS, "train", "--nproc=1"]),
        (
            ["runner.torchrun.nnodes=2", "runner.torchrun.standalone=false", "runner.torchrun.rdzv_endpoint=n:1"],
            [
                sys.executable,
                "-m",
                "apollo_sft.cli.launcher",
                "--nnodes=2",
                "--nproc_per_node=2",
                "--rdzv_endpoint=n:1",
            ],
        ),
    ],
)
def test_how_the_trainer_is_started(
    file: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    *_, train = commands(capsys, file, *words)
    assert train[: len(expected)] == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data.max_length"], "--data.max_length has no value"),
        (["--data.max_length", "--trainer.seed", "1"], "--data.max_length has no value"),
        (["data.max_lenght=8"], "did you mean data.max_length?"),
        (["preprocess.module=alphaapollo.data_preprocess.prepare_evolving_data"], "prepare_evolving_data"),
        (["runner.module=verl.trainer.main_ppo"], "verl.trainer.main_ppo"),
        (["runner.launcher=deepspeed"], "runner.launcher"),
        (["runner.torchrunn.nnodes=2"], "runner.torchrunn"),
        (["preprocess.3.local_dir=x"], "preprocess.3.local_dir: there is no such step"),
        (["preprocess.local_dir=${nowhere}"], "nowhere"),
        (["other.yaml"], "a workflow is one file"),
        (["evaluate.local_dir=x"], "unknown key evaluate.local_dir"),
    ],
)
def test_refused_before_anything_runs(
    file: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert named in refusal(capsys, file, *words)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("preprocess: [", "cannot be read"),
        ("- a", "is not the workflow of a training"),
        ("preprocess: []", "runner: Field required"),
        (FILE + "evaluate: {}", "evaluate"),
        (FILE.replace("data_source: org", "data_source: ${runner.nothing}"), "nothing"),
        (FILE.replace("args:", "arguments:"), "preprocess.0.arguments"),
    ],
)
def test_a_file_that_is_none(file: Path, capsys: pytest.CaptureFixture[str], text: str, named: str) -> None:
    file.write_text(text)
    assert named in refusal(capsys, file)


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in refusal(capsys, tmp_path / "nowhere.yaml")


def test_it_stops_at_the_first_command_that_fails(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "alphaapollo.data_preprocess.prepare_sft_no_tool"
    assert PREPARES[name] == "sft-no-tool"
    code = main(["workflow", str(file), "preprocess.no_such_option=1"])
    said = capfd.readouterr()
    assert code == 2
    assert said.out.count("+ ") == 1, said.out
    assert "no_such_option" in said.err or "unknown command" in said.err
