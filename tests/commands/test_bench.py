"""The benches run, in a tiny setting, and print their tables."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.support.data import tiny_tokenizer
from tests.support.runs import write_inputs

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


def test_rounding(tmp_path: Path) -> None:
    """In a step that bfloat16 does not see: rounded to the nearest, nothing of the training is left."""
    inputs = write_inputs(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model").to(torch.bfloat16).float()
    ids = tiny_tokenizer()("one two three four", return_tensors="pt")["input_ids"]
    for name in ("base", "trained"):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad.sign() * parameter.abs() * 2.0**-10
    rows = lines(
        "rounding.py", str(tmp_path / "trained"), str(inputs / "train.parquet"), "--base", str(tmp_path / "base")
    )
    (base,), (whole,), (nearest,), (ours,) = (rows[name] for name in rows)
    assert list(rows) == ["the base", "float32", "bfloat16, to the nearest", "bfloat16, as it is written"]
    assert abs(whole - base) > 2e-4
    assert abs(nearest - base) < abs(whole - base) / 5
    assert abs(ours - whole) < abs(whole - base) / 2
