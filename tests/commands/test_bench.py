"""The benches run, in a tiny setting, and print their tables."""

import re
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"


def lines(script: str, *arguments: str) -> dict[str, list[float]]:
    """The rows of the printed table: name and figures."""
    command = [sys.executable, str(BENCH / script), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    split = (re.split(r"\s{2,}", line.strip()) for line in finished.stdout.splitlines() if "   " in line.strip())
    return {
        name: [float(cell.split(" ")[0]) for cell in cells] for name, *cells in split if cells and cells[0][0].isdigit()
    }


def test_plan() -> None:
    rows = lines("plan.py", "--samples", "20000", "--ranks", "8", "--per-rank", "32", "--steps", "2")
    assert list(rows) == ["equal counts", "balanced", "token-capped", "balanced, token-capped"]
    assert rows["balanced"][-1] < 1.05 < rows["equal counts"][-1]


def test_layouts() -> None:
    small = ["--hidden", "32", "--layers", "1", "--tokens", "200", "--steps", "1", "--ranks", "2"]
    rows = lines("layouts.py", *small)
    assert list(rows) == ["one rank", "2 ranks, fsdp2", "2 ranks, fsdp", "sp 2, fsdp2", "sp 2, fsdp"]
    assert rows["one rank"] == [1.0] * 5
    for name in ("sp 2, fsdp2", "sp 2, fsdp"):
        _, weights, activations, logits, _ = rows[name]
        assert weights < 0.52
        assert max(activations, logits) < 0.55


def test_save() -> None:
    rows = lines("save.py", "--hidden", "64", "--layers", "1", "--every", "2", "--saves", "2")
    assert list(rows) == ["no checkpoint", "synchronous", "synchronous, no hf/", "asynchronous", "asynchronous, no hf/"]
    copies = {name: figures[2] for name, figures in rows.items()}
    assert copies["synchronous"] == copies["no checkpoint"] == 0
    assert copies["asynchronous"] == copies["asynchronous, no hf/"] > 1e6
