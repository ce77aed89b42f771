"""The command line as a user meets it: help, version, mistakes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apollo_sft import __main__ as entry
from apollo_sft.cli.main import COMMANDS, main

SCRIPT = Path(sys.executable).parent / "apollo-sft"
PROGRAMS = {"module": [sys.executable, "-m", "apollo_sft"], "command": [str(SCRIPT), "train"]}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_command_is_a_file_and_stands_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, meaning in COMMANDS.items():
        assert importlib.util.find_spec(f"apollo_sft.cli.{name}") is not None
        assert f"  {name} " in text
        assert meaning in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["data.max_length=8"],
            "unknown command data.max_length=8; did you mean apollo-sft train data.max_length=8 …?",
        ),
        (["Train"], "did you mean train?"),
        (["--verbose"], "unknown command --verbose; there are train"),
        (["train", "--nproc", "0"], "--nproc takes a number of processes"),
        (["train", "--nproc=2=3"], "found:    '2=3'"),
        (["train", "--verbose"], "unknown option --verbose"),
        (["train", "--cfg"], "expected: --cfg job"),
        (["train", "--cfg", "job", "--nproc"], "--nproc takes a number of processes"),
    ],
)
def test_mistakes_are_one_message_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("apollo-sft: ")
    assert said in captured.err
    assert captured.out == ""


def test_nproc_under_the_module_says_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--nproc", "2"]) == 2
    assert "apollo-sft train --nproc N" in capsys.readouterr().err


@pytest.mark.skipif(not SCRIPT.exists(), reason="the package is not installed")
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_cfg_job_is_yaml_of_what_would_run(program: list[str]) -> None:
    finished = run(*program, "--cfg", "job", "data.train_files=~/ü 1.parquet", "data.val_files=null", "optim.lr=1")
    assert finished.returncode == 0
    config = yaml.safe_load(finished.stdout)
    assert config["data"]["train_files"] == [str(Path("~/ü 1.parquet").expanduser())]
    assert config["optim"]["lr"] == 1.0
    assert finished.stderr == ""


@pytest.mark.skipif(not SCRIPT.exists(), reason="the package is not installed")
def test_the_installed_command_says_its_version_and_passes_the_code_on() -> None:
    assert run(str(SCRIPT), "--version").stdout.startswith("apollo-sft 0.")
    refused = run(str(SCRIPT), "train", "data.max_lenght=8", "optim.lr=x")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "did you mean data.max_length?" in refused.stderr
    assert "optim.lr has a value that cannot be used" in refused.stderr
    assert refused.stderr.count("apollo-sft: ") == 1
