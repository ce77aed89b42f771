"""The benches run, in a tiny setting, and print their tables."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import python
from tests.support.data import tiny_tokenizer
from tests.support.runs import write_inputs

BENCH = Path(__file__).resolve().parents[2] / "bench"


def output(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCH / script), *arguments]
    starts = subprocess.run if script == "head.py" else python.run  # it measures what a new process grows by
    finished = starts(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def lines(script: str, *arguments: str) -> dict[str, list[float]]:
    """The rows of the printed table: name and figures."""
    printed = output(script, *arguments).splitlines()
    split = (re.split(r"\s{2,}", line.strip()) for line in printed if "   " in line.strip())
    return {
        name: [float(cell.split(" ")[0]) for cell in cells] for name, *cells in split if cells and cells[0][0].isdigit()
    }


def test_plan() -> None:
    rows = lines("plan.py", "--samples", "20000", "--ranks", "8", "--per-rank", "32", "--steps", "2")
    assert list(rows) == ["equal counts", "balanced", "token-capped", "balanced, token-capped", "a mixture"]
    assert rows["balanced"][-1] < 1.05 < rows["equal counts"][-1]


@pytest.mark.long
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
    rows = lines("save.py", "--hidden", "64", "--layers", "1", "--every", "2", "--saves", "1")
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


@pytest.mark.long
def test_step(tmp_path: Path) -> None:
    """The first losses of both loops are the same: they do the same work."""
    ratios = tmp_path / "ratios.json"
    small = ["--hidden", "64", "--layers", "1", "--rows", "2", "--pairs", "1", "--cases", "fp32-lora-1"]
    table = output("step.py", *small, "--ratios", str(ratios))
    (cells,) = [line.split(" | ") for line in table.splitlines() if "fp32-lora-1" in line]
    assert float(cells[5]) < 1e-6
    (ratio,) = json.loads(ratios.read_text())["step"]["fp32-lora-1"]
    assert f"{ratio:.2f}" == cells[3].split(" ")[0]


def test_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of forming the loss gives the same one; ours holds least, and no more for more tokens."""
    monkeypatch.syspath_prepend(str(BENCH))
    import head

    parts = head.inputs(4096, 16, 256, 0.75)
    losses = [head.once(name, *parts) for name in head.VARIANTS]
    assert max(losses) - min(losses) < 1e-5 * losses[0]
    held = {name: head.counted_bytes(name, 4096, 16, 8192, 0.75) for name in head.VARIANTS}
    assert min(held, key=held.__getitem__) in ("ours", "checkpointed chunks")
    assert held["target rows only"] < 0.8 * held["full logits"]
    more = head.counted_bytes("ours", 4096, 16, 16384, 0.75)
    assert more - held["ours"] < 0.01 * (head.counted_bytes("full logits", 4096, 16, 16384, 0.75) - held["full logits"])


@pytest.mark.long
def test_scale(tmp_path: Path) -> None:
    drawing = tmp_path / "scale.svg"
    arguments = ["--what", "tokens,rows", "--most-rows", "10000", "--pairs", "1", "--drawing", str(drawing)]
    tables = output("scale.py", *arguments)
    found = [int(line.split(" ")[1].replace(",", "")) for line in tables.splitlines() if re.match(r"\| \d", line)]
    assert found == [512, 1024, 2048, 4096, 8192, 10_000]
    root = ElementTree.fromstring(drawing.read_text())
    assert len(root.findall("{http://www.w3.org/2000/svg}g")) == 4


def test_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench rewrites its own section and no other one."""
    monkeypatch.syspath_prepend(str(BENCH))
    import record

    path = tmp_path / "results.md"
    for name, text in (("step", "one\n\n### more"), ("head", "two"), ("step", "three\n\n### more")):
        record.write_section(name, text, path)
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## head", "## step"]
    assert "one" not in text.replace("none", "")
    assert text.index("two") < text.index("three") < text.index("### more")
    assert record.machine() in text
    assert str(record.over([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])) == "3.00 (2.00 to 4.00)"


@pytest.mark.long
def test_peers(tmp_path: Path) -> None:
    """Our part of it; the peers' environments are made by the command itself and need the package index."""
    small = ["--hidden", "64", "--layers", "1", "--steps", "5", "--batch", "2", "--dtypes", "fp32", "--peers", ""]
    tables = output("peers.py", *small, "--environments", str(tmp_path))
    lines = [line for line in tables.splitlines() if line.startswith("| apollo-sft")]
    assert len(lines) == 2
    assert "1.00 (1.00 to 1.00)" in lines[0]
