from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from apollo_sft.cli import demo
from apollo_sft.errors import ConfigError


def _demo(folder: Path) -> demo.Demo:
    return demo.Demo(folder, seed=1, num_steps=1100, num_processes=2)


def test_a_folder_with_files_of_others_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by the demo"):
        demo.main(["--folder", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("argument", ["--steps=0", "--nproc=0", "--seed=x", "--speed=9"])
def test_a_wrong_argument_exits_with_2(argument: str):
    with pytest.raises(SystemExit) as stopped:
        demo.main([argument])
    assert stopped.value.code == 2


def test_the_command_is_printed_unwrapped_and_pastes_back(tmp_path: Path):
    output = io.StringIO()
    command = demo.training_command(
        _demo(tmp_path / "a rather long name with spaces in it" / ("x" * 90)), "single_turn"
    )
    demo._print_command(Console(file=output, width=40), command)
    pasted = output.getvalue().replace("\\\n", " ")
    assert shlex.split(pasted) == command


def test_the_exit_code_of_the_training_is_passed_on():
    assert demo._train([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_three_examples_of_one_and_two_steps():
    held_out = demo.HeldOut(["q"] * 5, ["1 + 1 = 2\n2 - 1 = 1\n#### 1", *["1 + 1 = 2\n#### 2"] * 4])
    assert held_out.examples() == [1, 2, 0]


@pytest.mark.parametrize(("right", "learned"), [(200, True), (180, True), (179, False), (0, False)])
def test_the_result_line_and_the_verdict(right: int, learned: bool):
    output = io.StringIO()
    truths = ["1 + 1 = 2\n#### 2"] * 200
    after = ["#### 2"] * right + ["#### 3"] * (200 - right)
    said = demo._print_result(Console(file=output), demo.HeldOut(["q"] * 200, truths), [""] * 200, after, 61.0)
    assert said is learned
    lines = output.getvalue().splitlines()
    assert "exact match before: 0 %" in lines
    assert f"exact match after: {right / 2:g} %" in lines
    assert ("failed to learn" in output.getvalue()) is not learned
