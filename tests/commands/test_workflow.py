"""`apollo-sft workflow` on files as AlphaApollo writes them: from the data to a model, by one command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from apollo_sft.prepare.demo_model import write_base_model
from tests.support import python
from tests.support.runs import TIMEOUT_SECONDS, status

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "workflows" / "gsm8k.yaml"
THEIRS = """
env:
  CUDA_VISIBLE_DEVICES: ""
preprocess:
  - module: alphaapollo.data_preprocess.prepare_sft_no_tool
    args:
      data_source: math
      local_dir: ./data
runner:
  launcher: python
  module: alphaapollo.core.generation.verl.trainer.fsdp_sft_trainer
  overrides:
    - data.train_files=${preprocess.0.args.local_dir}/${preprocess.0.args.data_source}/train.parquet
    - data.val_files=${preprocess.0.args.local_dir}/${preprocess.0.args.data_source}/test.parquet
    - data.prompt_key=question
    - data.response_key=answer
    - data.prompt_dict_keys=[]
    - data.response_dict_keys=[]
    - data.truncation=right
    - data.micro_batch_size=4
    - trainer.logger=['console']
    - trainer.default_hdfs_dir=null
    - trainer.total_epochs=1
    - use_remove_padding=true
"""
SMALL = ["data.train_batch_size=8", "trainer.device=cpu", "trainer.total_training_steps=2", "data.max_length=512"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, and `math`: problems in two columns."""
    write_base_model(tmp_path / "model", ["What is 2 + 3? 2 + 3 = 5. #### 5"] * 20, seed=1)
    (tmp_path / "math").mkdir()
    for split, numbers in (("train", range(24)), ("test", range(24, 32))):
        rows = [f'{{"question": "What is {n} + 3?", "answer": "{n} + 3 = {n + 3}.\\n#### {n + 3}"}}' for n in numbers]
        (tmp_path / "math" / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


def start(folder: Path, *words: str | Path) -> "subprocess.Popen[str]":
    model = [f"model.partial_pretrain={folder / 'model'}", f"trainer.default_local_dir={folder / 'out'}"]
    command = [sys.executable, "-m", "apollo_sft.cli.main", "workflow", *SMALL, *model, *map(str, words)]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), "HOME": str(folder)}
    return python.start(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workflow(folder: Path, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    running = start(folder, *words)
    said, complained = running.communicate(timeout=TIMEOUT_SECONDS)
    return subprocess.CompletedProcess([], running.returncode, said, complained)


def test_the_sample_file_makes_a_model(folder: Path) -> None:
    ended = workflow(folder, SAMPLE, "preprocess.local_dataset_path=math")
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    started = [line.split(" -m ", 1)[1].split()[1:3] for line in ended.stdout.splitlines() if line.startswith("+ ")]
    assert started == [["prepare", "gsm8k"], ["train", "--nproc=2"]]
    assert status(folder / "out") == "finished"
    assert AutoModelForCausalLM.from_pretrained(folder / "out").num_parameters()


def test_what_fails_first_ends_it_with_its_exit_code(folder: Path) -> None:
    ended = workflow(folder, SAMPLE, "preprocess.local_dataset_path=nowhere")
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert "nowhere" in ended.stderr
    assert "apollo_sft.cli.main train" not in ended.stdout
    assert not (folder / "out").exists()


def test_a_file_of_alphaapollo_runs_with_our_modules_and_a_signal_reaches_its_training(folder: Path) -> None:
    (folder / "theirs.yaml").write_text(THEIRS)
    running = start(folder, "theirs.yaml", "trainer.total_training_steps=1000000", "data.val_files=null")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (folder / "out" / "metrics.jsonl").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=TIMEOUT_SECONDS)
    assert (folder / "data" / "math" / "train.parquet").is_file()
    assert (running.returncode, status(folder / "out")) == (75, "preempted"), said
