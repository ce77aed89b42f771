"""A change may not slow the step or the head by more than 5 % of what `bench/recorded.json` holds.

Figures are ratios to plain PyTorch in CPU time of one thread, medians of interleaved pairs, and in counted bytes.
Where the first pairs say no, as many again are measured, and all of them count. Recorded by `--write` of the bench: on
another processor record them anew.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
MOST_LOST = 0.05
CASES = {"step": ["--pairs", "5"], "head": ["--pairs", "5", "--vocabularies", "32768", "--growth", "0"]}


def measured(name: str, folder: Path) -> dict[str, list[float]]:
    out = folder / "ratios.json"
    command = [sys.executable, str(BENCH / f"{name}.py"), *CASES[name], "--ratios", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found: dict[str, list[float]] = json.loads(out.read_text())[name]
    return found


def lost(found: dict[str, list[float]], recorded: dict[str, list[float]], higher_is_better: bool) -> dict[str, float]:
    """Cases that are worse than recorded by more than 5 %, and by how much."""
    worse = {}
    for case, values in found.items():
        change = statistics.median(values) / statistics.median(recorded[case]) - 1
        loss = -change if higher_is_better else change
        if loss > MOST_LOST:
            worse[case] = round(loss, 3)
    return worse


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_nothing_became_slower(name: str, tmp_path: Path) -> None:
    recorded = json.loads((BENCH / "recorded.json").read_text())[name]
    found = measured(name, tmp_path)
    assert set(found) <= set(recorded)
    if lost(found, recorded, higher_is_better=name == "step"):
        again = measured(name, tmp_path)
        found = {case: values + again[case] for case, values in found.items()}
    assert lost(found, recorded, higher_is_better=name == "step") == {}


def test_the_guard_sees_a_loss() -> None:
    recorded = {"a": [1.0, 1.02, 0.98], "b": [0.5]}
    assert lost({"a": [0.94, 0.9, 0.99], "b": [0.5]}, recorded, higher_is_better=True) == {"a": 0.06}
    assert lost({"b": [0.53]}, recorded, higher_is_better=False) == {"b": 0.06}
    assert lost({"a": [0.96], "b": [0.52]}, recorded, higher_is_better=True) == {}
