"""Every command that README and docs show is run here, or is listed with the reason why it cannot be.

Paths, the model and sizes are replaced; nothing else. A new command in a document fails the count.
"""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import write_word_problems
from tests.support import python
from tests.support.chain import write_chain_model
from tests.support.data import write_parquet

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("make", "apollo-sft", "torchrun", "python", "git", "pip")

MAKE = "runs the suite itself, or what CI and the long tests run"
PREPARE = "tests/commands/test_prepare.py"
FRESH = "a fresh clone: tests/commands/test_fresh_clone.py (long)"
SMALL = {
    "data.train_batch_size": "8",
    "data.micro_batch_size_per_gpu": "4",
    "data.max_length": "512",
    "trainer.total_training_steps": "2",
    "trainer.device": "cpu",
}


@dataclass(frozen=True)
class Inputs:
    """What stands in for the user's model and data."""

    model: Path
    single_turn: Path
    multi_turn: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    write_word_problems(folder / "data", 40, 8, seed=1)
    write_base_model(folder / "model", ["Ann has 3 pens. #### 3", "How many pens does Ann have?"] * 20, seed=1)
    return Inputs(folder / "model", folder / "data" / "single_turn", folder / "data" / "multiturn")


def documented() -> list[str]:
    """Commands in fenced blocks and in the first column of tables, continuation lines joined."""
    commands = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)).replace("\\\n", " ")
        in_tables = re.findall(r"^\| `([^`]+)` \|", text, re.M)
        for line in [*fenced.splitlines(), *in_tables]:
            command = " ".join(line.split("  #")[0].split())
            if command.split(" ")[0] in PROGRAMS:
                commands.append(command)
    return commands


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command, whose program is forked. `test_commands_that_print` starts the programs themselves."""
    program, *words = arguments
    assert (python.PROGRAMS / program).is_file()
    path = sys.executable if program == "python" else str(python.PROGRAMS / program)
    return started([path, *words], folder)


def started(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HOME": str(folder),
        "PATH": f"{python.PROGRAMS}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder),
    }
    return python.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def replaced(command: str, inputs: Inputs, out: Path) -> list[str]:
    """The command with the user's model, data and folder replaced by small ones."""
    words = [word for word in shlex.split(command) if "…" not in word]
    multi = "data.multiturn.enable=true" in words
    data = inputs.multi_turn if multi else inputs.single_turn
    changed = SMALL | {
        "model.partial_pretrain": str(inputs.model),
        "data.train_files": str(data / "train.parquet"),
        "data.val_files": str(data / "test.parquet"),
        "trainer.default_local_dir": str(out),
    }
    if not multi:
        changed |= {"data.prompt_key": "extra_info", "data.response_key": "extra_info"}
    gone = {*changed, "data.micro_batch_size", "key"}
    kept = [word for word in words if word.partition("=")[0] not in gone]
    return [*kept, *(f"{key}={value}" for key, value in changed.items())]


TRAININGS = [
    "apollo-sft train model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct data.train_files=train.parquet "
    "data.val_files=val.parquet data.prompt_key=question data.response_key=answer optim.lr=1e-5 "
    "trainer.default_local_dir=out",
    "torchrun --standalone --nnodes=1 --nproc_per_node=2 -m apollo_sft "
    "data.train_files=$HOME/data/multiturn/train.parquet data.val_files=$HOME/data/multiturn/test.parquet "
    "data.multiturn.enable=true data.multiturn.messages_key=messages data.max_length=2048 "
    "model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct trainer.total_epochs=4",
    "apollo-sft train key=value …",
    "python -m apollo_sft key=value …",
]
AFTER_A_TRAINING = [
    "apollo-sft export out out-best --step best",
    "apollo-sft handoff out",
    "apollo-sft eval out test.parquet",
]
PRINTING = {
    "apollo-sft train --help": "micro_batch_size_per_gpu: 4",
    "python -m apollo_sft --cfg job key=value …": "max_length: 1024",
}
CLUSTER = "needs several hosts: tests/ranks/test_two_agents.py starts two agents on this one"
ELSEWHERE = {
    "torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node001:29400 --rdzv_id=my-run "
    "-m apollo_sft model.partial_pretrain=/shared/models/Qwen2.5-7B-Instruct "
    "data.train_files=/shared/data/train.parquet data.val_files=/shared/data/val.parquet "
    "trainer.default_local_dir=/shared/runs/my-run": CLUSTER,
    "git clone … && cd apollo-sft": FRESH,
    "make demo": FRESH,
    "make test": MAKE,
    "make test-long": MAKE,
    "make check": MAKE,
    "make docs": "tests/commands/test_site.py",
    "make docs-reference": "tests/unit/config/test_reference.py",
    "make env": FRESH,
    "make dev": FRESH,
    "apollo-sft inspect key=value …": "tests/commands/test_inspect.py",
    "apollo-sft verify key=value …": "tests/commands/test_verify.py",
    "apollo-sft plan key=value …": "tests/unit/cli/test_plan.py",
    "apollo-sft plan model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct --gpus 8 --gpu-memory 80GiB "
    "data.max_length=4096": "tests/unit/cli/test_plan.py",
    "apollo-sft report DIR …": "tests/commands/test_report.py",
    "apollo-sft report runs/lr-2e-5 runs/lr-1e-5 -o compared.html": "tests/commands/test_report.py",
    "apollo-sft store list": "tests/unit/cli/test_store.py",
    "apollo-sft store prune --older-than 30d": "tests/unit/cli/test_store.py",
    "apollo-sft demo": "tests/commands/test_demo_command.py",
    "pip install -c requirements/constraints.txt -e '.[rl]'": "part of what make test installs",
    "pip install 'apollo-sft[liger]'": "tests/parity/test_liger.py installs the kernels alone",
    "python -m examples.rl.grpo --seed 0 --out apollo-rl": "tests/commands/test_rl_example.py",
    "python -m examples.rl.grpo": "tests/commands/test_rl_example.py",
    "apollo-sft handoff /tmp/sft_ckpt": "tests/commands/test_documented.py, on another folder",
    "apollo-sft prepare gsm8k": PREPARE,
    "apollo-sft prepare informal-math --data_source DigitalLearningGmbH/MATH-lighteval": PREPARE,
    "apollo-sft prepare multiturn": PREPARE,
    "apollo-sft prepare sft-tool": PREPARE,
    "apollo-sft prepare sft-no-tool": PREPARE,
    "apollo-sft prepare custom --local_dataset_path chats.jsonl --splits train --dry_run": PREPARE,
    "apollo-sft prepare custom --local_dataset_path table.parquet --splits train --prompt_column q "
    "--response_column a": PREPARE,
    "apollo-sft export RUN_FOLDER OUT": "tests/ranks/test_export_command.py",
    "apollo-sft handoff DIR": "tests/ranks/test_handoff.py",
    "apollo-sft eval DIR FILE.parquet": "tests/unit/cli/test_eval.py",
    "apollo-sft workflow FILE.yaml key=value …": "tests/unit/cli/test_workflow.py",
    "apollo-sft workflow examples/workflows/gsm8k.yaml": "tests/commands/test_workflow.py",
}


def test_every_documented_command_is_known() -> None:
    counts = Counter(documented())
    known = {*TRAININGS, *AFTER_A_TRAINING, *PRINTING, *ELSEWHERE}
    assert set(counts) == known, f"unknown: {set(counts) - known}; gone: {known - set(counts)}"


@pytest.mark.parametrize("command", TRAININGS, ids=lambda c: c[:40])
def test_trainings_leave_a_model_that_transformers_opens(command: str, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished = run(replaced(command, inputs, out), tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    opened = run(
        [sys.executable, "-c", f"{snippet}\nassert model.num_parameters() and tokenizer.chat_template"], tmp_path
    )
    assert opened.returncode == 0, opened.stderr[-2000:]


def test_the_commands_after_a_training(tmp_path: Path) -> None:
    """On a model that knows its one answer before it is trained."""
    base = write_chain_model(tmp_path / "base")
    write_parquet(tmp_path / "test.parquet", [{"question": f"{n}", "answer": "so \\boxed{7}"} for n in range(8)])
    keys = [
        *(f"{key}={value}" for key, value in (SMALL | {"data.max_length": "128"}).items()),
        *("data.train_files=test.parquet", "data.val_files=test.parquet", "data.prompt_key=question"),
        *(f"model.partial_pretrain={base}", "optim.lr=1e-6", "trainer.default_local_dir=out"),
        "trainer.save_best_on=val/loss",
    ]
    trained = run(["apollo-sft", "train", "--nproc", "1", *keys], tmp_path)
    assert trained.returncode == 0, trained.stderr[-4000:]
    said = {command: run(shlex.split(command), tmp_path) for command in AFTER_A_TRAINING}
    assert [done.returncode for done in said.values()] == [0, 0, 0], [done.stderr[-1000:] for done in said.values()]
    export, handoff, evaluation = (" ".join(done.stdout.split()) for done in said.values())
    assert "out-best: the model of" in export
    assert "RL can start from this folder" in handoff
    assert "8 of 8: 100.0 %" in evaluation


@pytest.mark.parametrize("command", PRINTING)
def test_commands_that_print(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command) if "…" not in word and word != "key=value"]
    finished = started([*words, *(["data.val_files=null"] if "--cfg" in words else [])], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert PRINTING[command] in finished.stdout
