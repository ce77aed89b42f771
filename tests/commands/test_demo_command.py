"""`apollo-sft demo` as a user starts it: a process of its own, in a folder of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import python

Starts = Callable[..., "subprocess.CompletedProcess[str]"]
PROGRAM = str(python.PROGRAMS / "apollo-sft")


def _demo(folder: Path, *arguments: str, starts: Starts = python.run) -> subprocess.CompletedProcess[str]:
    """Run the demo. By `python.run` it is forked, and so is the training that it starts."""
    return starts([PROGRAM, "demo", *arguments], cwd=folder, capture_output=True, text=True, timeout=550, check=False)


def _after(output: str) -> float:
    match = re.search(r"^exact match after: ([\d.]+) %$", output, flags=re.MULTILINE)
    assert match, output[-3000:]
    return float(match[1])


def test_a_demo_that_trains_too_little_says_so_and_can_be_run_again(tmp_path: Path):
    first = _demo(tmp_path, "--steps=3")
    assert first.returncode == 1, first.stdout[-3000:] + first.stderr[-3000:]
    assert _after(first.stdout) < 50
    assert "Training failed to learn" in first.stdout
    assert "\x1b" not in first.stdout
    assert len((tmp_path / "apollo-demo/trained-model/metrics.jsonl").read_text().splitlines()) == 3

    again = _demo(tmp_path, "--steps=2", "--nproc=1", starts=subprocess.run)
    assert again.returncode == 1, again.stdout[-3000:] + again.stderr[-3000:]
    assert len((tmp_path / "apollo-demo/trained-model/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(tmp_path: Path, seed: int):
    run = _demo(tmp_path, f"--seed={seed}")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert _after(run.stdout) >= 90
