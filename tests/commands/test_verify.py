"""`apollo-sft verify` as a user starts it: what it shows, and what it says when a layout is not exact."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import write_word_problems
from tests.support import python

LEAK = """
import torch
from apollo_sft.model import attention

register = attention.register

def leaking(kernel, exchange=None):
    def kernel_of_fewer(query, key, value, documents, options):
        starts = documents.starts
        if len(starts) > 3:  # the last two of three documents see each other; two alone are right
            documents = attention.Documents(torch.cat([starts[:-2], starts[-1:]]), documents.longest)
        return kernel(query, key, value, documents, options)
    register(kernel_of_fewer, exchange)

attention.register = leaking
"""
CRASH = """
import os
from apollo_sft.model import attention

register = attention.register

def failing(kernel, exchange=None):
    def only_alone(*arguments):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("the kernel of this rank is out of order")
        return kernel(*arguments)
    register(only_alone, exchange)

attention.register = failing
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_word_problems(folder / "data", 24, 4, seed=1)
    write_base_model(folder / "model", ["Ann has 3 pens. #### 3", "How many pens does Ann have?"] * 20, seed=1)
    (folder / "leaking_kernel.py").write_text(LEAK)
    (folder / "failing_kernel.py").write_text(CRASH)
    return folder


def verify(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    common = [
        "model.partial_pretrain=model",
        "data.train_files=data/single_turn/train.parquet",
        "data.val_files=null",
        "data.prompt_key=extra_info",
        "data.response_key=extra_info",
        "data.train_batch_size=8",
        "optim.lr=1e-3",
    ]
    return python.run(
        [sys.executable, "-m", "apollo_sft.cli.main", "verify", *common, *arguments],
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def rows(output: str) -> list[tuple[str, str]]:
    """Layout and verdict of each row of the table."""
    return re.findall(r"^  (\S.*?)  +(?:[-\d.]\S*  +){3}(exact|WRONG|FAILED|not run)$", output, re.M)


def test_every_layout_of_two_processes_is_exact(folder: Path) -> None:
    finished = verify(folder, "--ranks", "2", "data.micro_batch_size=3", "ulysses_sequence_parallel_size=2")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = rows(finished.stdout)
    assert len(found) >= 12 and {verdict for _, verdict in found} == {"exact"}
    assert ("yours: sp 2, micro 3", "exact") in found
    assert {"dp 2, FSDP1, micro 3", "dp 2, FSDP1, micro 1, offload, no_sync"} <= {name for name, _ in found}
    oracle = re.search(r"^  oracle +([\d.]+) +([\d.]+)$", finished.stdout, re.M)
    assert oracle
    assert finished.stdout.count(oracle[1]) == finished.stdout.count(oracle[2]) == len(found) + 1
    assert re.search(rf"^All {len(found)} layouts give the gradient of the oracle; the largest", finished.stdout, re.M)
    assert "\x1b" not in finished.stdout
    assert not list(folder.glob("apollo-verify-*"))


def test_a_kernel_that_leaks_fails_where_three_documents_meet(folder: Path) -> None:
    finished = verify(folder, "--ranks=1", "model.external_lib=leaking_kernel")
    assert finished.returncode == 1, finished.stdout + finished.stderr
    verdicts = dict(rows(finished.stdout))
    assert verdicts["micro 1"] == "exact"
    assert verdicts["yours: micro 4"] == verdicts["micro 4, checkpointing"] == "WRONG"
    assert re.search(
        r"^1 process, yours: micro 4\n  differs by \d.\de-0\d in step \d, gradient of model", finished.stdout, re.M
    )
    assert "layouts do not give the gradient of the oracle" in finished.stdout


@pytest.mark.long
def test_a_rank_that_fails_is_named_and_the_rest_is_not_run(folder: Path) -> None:
    finished = verify(folder, "--ranks=2", "model.external_lib=failing_kernel")
    assert finished.returncode == 1, finished.stdout + finished.stderr
    verdicts = rows(finished.stdout)
    alone, together = verdicts[:5], verdicts[5:]
    assert {verdict for _, verdict in alone} == {"exact"}
    assert together[0] == ("yours: dp 2, micro 4", "FAILED")
    assert {verdict for _, verdict in together[1:]} == {"not run"}
    assert "RuntimeError: the kernel of this rank is out of order" in finished.stdout


@pytest.mark.long
def test_lora_and_real_weights(folder: Path) -> None:
    changes = ["model.lora_rank=4", "model.lora_dropout=0.1", "trainer.total_training_steps=3"]
    finished = verify(folder, "--ranks=1", "--real-weights", *changes)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    hidden = json.loads((folder / "model" / "config.json").read_text())["hidden_size"]
    assert f"the real weights in float64: 3 layers of {hidden}" in finished.stdout
    assert "with LoRA" in finished.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--ranks=none", "--ranks takes a number of processes"),
        ("optim.lrr=1", "optim.lrr"),
        ("data.prompt_key=extra", "column"),
    ],
)
def test_refusals_are_those_of_a_training(folder: Path, argument: str, message: str) -> None:
    refused = verify(folder, argument)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.startswith("apollo-sft: ") and message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help(folder: Path) -> None:
    helped = verify(folder, "--help")
    assert helped.returncode == 0
    assert "--real-weights" in helped.stdout and "Exit codes" in helped.stdout
