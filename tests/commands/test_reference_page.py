"""Every command of the reference page, run by bash in the page's own words.

`/tmp` and the home become a folder of the test, the models are tiny ones under the same names, `…` is filled in, and
keys of sizes are added at the end. Nothing else changes: `PYTHONPATH=compat` answers to verl's module name. The
programs are forked (`tests.support.shell`); one preparation and one training start as a user's do.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo_sft.prepare.demo_model import train_tokenizer
from tests.support import shell
from tests.support.models import save_tiny_model, tiny_config
from tests.support.runs import read_metrics, series, status

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
GSM8K = SHARED / "data" / "gsm8k" / "single_turn"
COMMAND = re.compile(r"^(?:torchrun|python3) (?:[^\n]*\\\n)*[^\n]*$", re.M)
SMALL = "data.train_batch_size=8 data.train_max_samples=32 data.val_max_samples=8 trainer.total_training_steps=2"
STEPS = 2
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]


def page() -> list[str]:
    return COMMAND.findall((SHARED / "reference_page.md").read_text(encoding="utf-8"))


Starts = Callable[[str, Path, dict[str, str], float], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Machine:
    """A user's machine: `folder` holds `home`, what the page calls `/tmp`, and `work`, where the models are."""

    folder: Path

    def in_checkout(self, command: str, more: str = "", starts: Starts = shell.run) -> None:
        """Examples are modules of a checkout: the page runs them there."""
        self._run(f"{command} {more}", ROOT, starts)

    def train(self, command: str, more: str, out: str | None = None, starts: Starts = shell.run) -> Path:
        """Returns the run's folder: `out` if it is given, else the command's own."""
        command = command.replace("/tmp/", f"{self.folder}/")
        named = re.findall(r"trainer\.default_local_dir=(\S+)", command)
        folder = self.folder / out if out is not None else Path(named[0])
        where = f"trainer.default_local_dir={folder}" if out is not None else ""
        self.in_work(f"{command} {more} {where} trainer.device=cpu", starts)
        return folder

    def in_work(self, command: str, starts: Starts = shell.run) -> None:
        self._run(command, self.folder / "work", starts)

    def _run(self, command: str, cwd: Path, starts: Starts) -> None:
        """Raises: AssertionError with the end of what it said."""
        variables = {
            "HOME": str(self.folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'compat'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        ended = starts(command, cwd, os.environ | variables, 1200)
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-1000:]}\n{ended.stderr[-4000:]}"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Models of one layer under the page's names, and a set of problems in the columns of MATH-lighteval."""
    folder = tmp_path_factory.mktemp("machine")
    rows = pq.read_table(GSM8K / "train.parquet").slice(0, 200).to_pylist()
    tokenizer = train_tokenizer([f"{row['prompt']}\n{row['response']}" for row in rows])
    config = tiny_config(
        "Qwen3",
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    first, *others = [folder / "work" / name for name in MODELS]
    save_tiny_model(first, config, torch.bfloat16)
    tokenizer.save_pretrained(first)
    for other in others:
        shutil.copytree(first, other)
    (folder / "math").mkdir()
    for split, numbers in (("train", range(40)), ("test", range(40, 48))):
        lines = [json.dumps(problem(number)) for number in numbers]
        (folder / "math" / f"{split}.jsonl").write_text("\n".join(lines))
    return Machine(folder)


def problem(n: int) -> dict[str, str]:
    solution = f"Adding gives ${n} + {n} = {2 * n}$, so the sum is $\\boxed{{\\frac{{{2 * n}}}{{1}}}}$."
    return {"problem": f"What is ${n} + {n}$?", "level": "Level 1", "type": "Algebra", "solution": solution}


def opened(out: Path, base: Path, steps: int) -> dict[str, torch.Tensor]:
    """The weights of the folder that a run left, which plain transformers opens; checked against the base model."""
    assert status(out) == "finished"
    metrics = read_metrics(out)
    assert len(series(metrics, "train/loss")) == steps
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, base))
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert model.dtype == before.dtype
    weights, old = model.state_dict(), before.state_dict()
    assert weights.keys() == old.keys()
    assert any(not torch.equal(weights[name], old[name]) for name in old), "it learned nothing"
    return weights


def columns(file: Path) -> set[str]:
    return set(pq.read_schema(file).names)


def filled(command: str, processes: int = 2) -> str:
    """The two commands with `…`, and the two names in angle brackets."""
    command = command.replace("torchrun ...", f"torchrun --standalone --nnodes=1 --nproc_per_node={processes}")
    command = command.replace("<N_GPUS>", str(processes)).replace("<MODEL_PATH>", MODELS[0])
    command = command.replace("<TRAIN_DATA>", "$HOME/data/gsm8k/train.parquet")
    return command.replace("\n...", "\ndata.val_files=$HOME/data/gsm8k/test.parquet")


def test_the_page_holds_nine_commands_and_all_of_them_are_run_here() -> None:
    text = (SHARED / "reference_page.md").read_text(encoding="utf-8")
    assert len(page()) == len(re.findall(r"(?<!\S)-m [a-z]", text)) == 9
    modules = [re.findall(r"-m (\S+)", command) for command in page()]
    assert [module.rpartition(".")[2] for (module,) in modules] == [
        *["fsdp_sft_trainer"] * 4,
        *["gsm8k", "prepare_informal_math", "multiturn"],
        *["fsdp_sft_trainer", "main_ppo"],
    ]
    assert sum("..." in command for command in page()) == 3


def test_preparations_and_trainings(machine: Machine) -> None:
    form, gsm8k, lora, multiturn, *preparations, _, _ = page()
    data = machine.folder / "home" / "data"

    machine.in_checkout(preparations[0], f"--local_dataset_path {GSM8K}", starts=shell.run_anew)
    assert {"extra_info", "question", "answer", "reward_model"} <= columns(data / "gsm8k" / "train.parquet")
    machine.in_checkout(preparations[1], f"--local_dataset_path {machine.folder / 'math'}")
    math = data / "DigitalLearningGmbH" / "MATH-lighteval"
    truths = pq.read_table(math / "test.parquet")["reward_model"].to_pylist()
    assert truths[0] == {"style": "rule", "ground_truth": "\\frac{80}{1}"}
    machine.in_checkout(preparations[2])
    assert pq.read_metadata(data / "multiturn" / "train.parquet").num_rows >= 2000
    assert pq.read_metadata(data / "multiturn" / "test.parquet").num_rows >= 200

    base = machine.folder / "work" / MODELS[0]
    out = machine.train(filled(form, processes=1), SMALL, out="form", starts=shell.run_anew)
    opened(out, base, STEPS)

    out = machine.train(gsm8k, SMALL)
    assert out.name == "sft_output"
    run = json.loads((out / "run.json").read_text())
    assert (run["processes"], run["overridden"]["ulysses_sequence_parallel_size"]) == (2, 2)
    opened(out, base, STEPS)
    assert len(series(read_metrics(out), "val/loss")) == 1

    for split in ("train", "test"):
        shutil.copy(math / f"{split}.parquet", data / f"{split}.parquet")
    out = machine.train(lora, SMALL, out="lora")
    weights = opened(out, machine.folder / "work" / MODELS[2], STEPS)
    assert not [name for name in weights if "lora" in name], "it is merged"
    assert (out / "adapter" / "adapter_config.json").is_file()

    out = machine.train(multiturn, SMALL, out="multiturn")
    opened(out, base, STEPS)


def test_the_pair(machine: Machine) -> None:
    """SFT, then the RL example from the folder that it left, in the place of `main_ppo`."""
    *_, sft, rl = page()
    data = machine.folder / "home" / "data" / "gsm8k"
    if not data.exists():
        machine.in_checkout(page()[4], f"--local_dataset_path {GSM8K}")
    out = machine.train(filled(sft), f"data.train_files=$HOME/data/gsm8k/train.parquet {SMALL}")
    assert out.name == "sft_ckpt" and f"actor_rollout_ref.model.path=/tmp/{out.name} " in rl
    opened(out, machine.folder / "work" / MODELS[1], STEPS)
    if importlib.util.find_spec("trl") is None:
        pytest.skip("the RL half of the pair needs TRL: pip install 'apollo-sft[rl]'")
    example = f"python3 -m examples.rl.grpo --model {out} --out {machine.folder / 'rl'} --steps 1 --held-out 4"
    machine.in_work(f"{example} || test $? = 1")  # that is: after one step the reward has not risen
    result = json.loads((machine.folder / "rl" / "result.json").read_text())
    assert (result["sft_model"], result["grpo"]["num_steps"]) == (str(out), 1)
    assert AutoModelForCausalLM.from_pretrained(result["rl_model"]).num_parameters()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_gsm8k_as_the_page_trains_it(machine: Machine) -> None:
    """No size replaced but the model's: 4 epochs of 7,473 rows in batches of 256."""
    machine.in_checkout(page()[4], f"--local_dataset_path {GSM8K} --local_save_dir $HOME/data/gsm8k")
    out = machine.train(page()[1], "", out="whole")
    opened(out, machine.folder / "work" / MODELS[0], 4 * 30)
    metrics = read_metrics(out)
    assert series(metrics, "val/loss")[-1] < series(metrics, "val/loss")[0]
    assert len(series(metrics, "val/loss")) == 4


@pytest.mark.long
def test_multiturn_as_the_page_trains_it(machine: Machine) -> None:
    """The same on what our script writes: 4 epochs of 2,048 rows in batches of 256."""
    machine.in_checkout(page()[6])
    out = machine.train(page()[3], "", out="whole_multiturn")
    opened(out, machine.folder / "work" / MODELS[0], 4 * 8)
    metrics = read_metrics(out)
    assert series(metrics, "val/loss")[-1] < series(metrics, "val/loss")[0]


@pytest.mark.long
def test_sequence_ranks_of_the_gsm8k_command_train_what_one_rank_does(machine: Machine) -> None:
    """On a model with 14 heads and 2 of keys, as Qwen2.5-0.5B has, and a vocabulary of its size."""
    base = machine.folder / "qwen2"
    shape = {"vocab_size": 151936, "hidden_size": 56, "num_attention_heads": 14, "max_position_embeddings": 1024}
    tokens = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
    save_tiny_model(base, tiny_config(**shape, **tokens, tie_word_embeddings=True))
    AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3").save_pretrained(base)
    machine.in_checkout(page()[4], f"--local_dataset_path {GSM8K}")
    command = page()[1]
    alone = command.replace("nproc_per_node=2", "nproc_per_node=1").replace("parallel_size=2", "parallel_size=1")
    assert alone.count("=1 ") > command.count("=1 ")
    losses = []
    for name, words in (("shared_rows", command), ("alone", alone)):
        metrics = read_metrics(machine.train(words, f"{SMALL} model.partial_pretrain={base}", out=name))
        losses.append([*series(metrics, "train/loss"), *series(metrics, "val/loss")])
    assert len(losses[0]) == STEPS + 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
