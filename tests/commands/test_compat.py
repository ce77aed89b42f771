"""`PYTHONPATH=compat`: scripts of verl start our trainer by its name, and nothing there passes for the rest of verl."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import python
from tests.support.runs import TIMEOUT_SECONDS, arguments, finish, status, write_inputs

ROOT = Path(__file__).resolve().parents[2]
COMPAT = ROOT / "compat"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(COMPAT)}
TRAINER = [sys.executable, "-m", "verl.trainer.fsdp_sft_trainer"]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def test_the_folder_holds_the_alias_and_nothing_else() -> None:
    files = {path.relative_to(COMPAT).as_posix() for path in COMPAT.rglob("*.py")}
    assert files == {"verl/__init__.py", "verl/trainer/__init__.py", "verl/trainer/fsdp_sft_trainer.py"}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (("-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo"), "verl.trainer.main_ppo"),
        (("-m", "verl.model_merger", "merge"), "verl.model_merger"),
        (("-m", "verl.workers.fsdp_workers"), "verl.workers"),
        (("-c", "import verl.utils.dataset.sft_dataset"), "verl.utils"),
        (("-c", "from verl import DataProto"), "verl.DataProto"),
        (("-c", "from verl.trainer import main_ppo"), "verl.trainer.main_ppo"),
        (("-c", "from verl.trainer.fsdp_sft_trainer import FSDPSFTTrainer"), "fsdp_sft_trainer.FSDPSFTTrainer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_other_part_of_verl_is_refused_in_one_sentence(asked: tuple[str, ...], named: str) -> None:
    ended = run(*asked)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert f"{named} is not here: {COMPAT} holds verl.trainer.fsdp_sft_trainer alone" in last
    assert "take that folder off PYTHONPATH" in last
    if asked[0] == "-m":
        assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr


def test_code_that_asks_whether_verl_is_there_gets_the_usual_error() -> None:
    probing = "try:\n  from verl.utils import fs\nexcept ImportError:\n  import verl.trainer\n  print('without')"
    assert run("-c", probing).stdout.strip() == "without"


def test_refusals_are_those_of_the_trainer() -> None:
    ended = run(*TRAINER[1:], "data.max_lenght=8")
    assert ended.returncode == 2
    assert ended.stderr.startswith("apollo-sft: unknown key data.max_lenght")


def test_a_signal_stops_it_as_it_stops_the_trainer(tmp_path: Path) -> None:
    inputs, out = write_inputs(tmp_path), tmp_path / "out"
    words = arguments(inputs, out, "trainer.total_training_steps=1000000", "data.val_files=null")
    process = python.start(
        [*TRAINER, *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert (process.returncode, status(out)) == (75, "preempted"), said
