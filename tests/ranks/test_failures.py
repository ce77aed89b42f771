"""An error that nobody foresaw: one traceback, whoever meets it, and last who failed of what."""

from pathlib import Path

import pytest

from tests.support.runs import finish, start, status, write_inputs

BREAKS = """
import os
import torch
import apollo_sft.train.run

def breaks(*arguments):
    if os.environ["BREAKING"] == "01":
        torch.distributed.barrier()  # at one time
    raise ValueError("no such kernel")

if os.environ["RANK"] in os.environ["BREAKING"]:
    apollo_sft.train.run.seed_everything = breaks
"""


@pytest.mark.parametrize("breaking", ["01", pytest.param("1", marks=pytest.mark.long)])
def test_one_traceback_and_the_cause_in_one_line(
    breaking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("BREAKING", breaking)
    inputs, out = write_inputs(tmp_path / "inputs"), tmp_path / "out"
    process = start(inputs, out, "model.external_lib=breaks", processes=2)
    said = finish(process).partition("torch/distributed/elastic")[0]
    assert process.returncode == 1
    assert said.count("Traceback") == 1, said
    causes = [line for line in said.splitlines() if line.startswith("apollo-sft: rank")]
    assert causes[0].endswith("ValueError: no such kernel")
    assert all("no such kernel" in line or "lost another rank" in line for line in causes)
    assert causes[0].split()[2] in breaking
    assert status(out) == "failed"
