"""`apollo-sft demo`: make data and a small model, train it, and show held-out answers before and after."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from apollo_sft.cli.eval import shown
from apollo_sft.errors import ConfigError
from apollo_sft.model.generate import exact_match, generate_answers, is_right, load_for_generation
from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import LARGEST, write_word_problems

NUM_TRAIN = 8000
NUM_HELD_OUT = 200
MAX_ANSWER_TOKENS = 40
ENOUGH = 0.9
MARKER = "demo.json"


@dataclass(frozen=True, slots=True)
class Demo:
    """The options of the demo, and its paths."""

    folder: Path
    seed: int
    num_steps: int
    num_processes: int

    @property
    def base_model(self) -> Path:
        """Return the folder of the untrained model."""
        return self.folder / "base-model"

    @property
    def trained_model(self) -> Path:
        """Return the folder of the trained model."""
        return self.folder / "trained-model"

    def data(self, layout: str, split: str) -> Path:
        """Return a file of data."""
        return self.folder / "data" / layout / f"{split}.parquet"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out questions and their answers."""

    questions: list[str]
    truths: list[str]

    def examples(self) -> list[int]:
        """Return three to show: two problems of one step and one of two."""
        one = [i for i, truth in enumerate(self.truths) if truth.count("\n") == 1]
        two = [i for i, truth in enumerate(self.truths) if truth.count("\n") == 2]
        return one[:2] + two[:1]


def main(argv: Sequence[str]) -> int:
    """Run the demo. Return the exit code: 0 the model learned, 1 it did not, else that of the training command.

    Raises: ConfigError when the folder holds something that the demo did not write.
    """
    demo = _parse(argv)
    console = Console(highlight=False)
    transformers_logging.disable_progress_bar()
    _claim(demo)

    console.rule("[bold]1  Data and a model from nothing")
    # Each step is shown before it runs: training takes a minute, in which a silent program looks broken.
    _prepare(demo)
    held_out = _read_held_out(demo)
    before = _answer(demo.base_model, held_out)
    _print_prepared(console, held_out)
    _print_answers(console, held_out, {"before": before})

    console.rule("[bold]2  Training")
    command = training_command(demo, "single_turn")
    _print_command(console, command)
    started = time.monotonic()
    code = _train(command)
    if code != 0:  # nothing to compare: the training has printed its own message
        console.print(f"\n[bold red]The training command ended with exit code {code}; its own message is above.")
        return code

    seconds = time.monotonic() - started

    console.rule("[bold]3  The same questions, answered by the folder that training left")
    after = _answer(demo.trained_model, held_out)
    _print_answers(console, held_out, {"before": before, "after": after})
    learned = _print_result(console, held_out, before, after, seconds)
    if learned:
        _print_next(console, demo)
        return 0

    return 1


def training_command(demo: Demo, layout: str) -> list[str]:
    """Return the command that trains on one layout of the demo's data, as a user would type it."""
    columns = ["data.multiturn.enable=true", "data.multiturn.messages_key=messages"]
    output = demo.folder / "trained-multiturn"
    if layout == "single_turn":
        columns = [
            "data.prompt_key=extra_info",
            "data.response_key=extra_info",
            "data.prompt_dict_keys=[question]",
            "+data.response_dict_keys=[answer]",
        ]
        output = demo.trained_model

    return [
        *_program(),
        "train",
        *("--nproc", str(demo.num_processes)),
        f"data.train_files={demo.data(layout, 'train')}",
        f"data.val_files={demo.data(layout, 'test')}",
        *columns,
        "data.train_batch_size=32",
        "data.micro_batch_size=16",
        f"model.partial_pretrain={demo.base_model}",
        "optim.lr=2e-3",
        "optim.betas=[0.9,0.98]",
        "optim.weight_decay=0.01",
        "optim.lr_scheduler=cosine",
        f"optim.lr_warmup_steps={min(40, demo.num_steps)}",
        "optim.clip_grad=1.0",
        f"trainer.total_training_steps={demo.num_steps}",
        f"trainer.default_local_dir={output}",
        "trainer.project_name=apollo-demo",
        f"trainer.experiment_name={layout}",
        f"trainer.seed={demo.seed}",
        "trainer.log_freq=50",
        "trainer.resume_mode=disable",
    ]


def _train(command: Sequence[str]) -> int:
    """Run the command and return its exit code.

    The terminal itself sends Ctrl-C to it: here it is ignored until the command ends. A SIGTERM is passed on.
    """
    with subprocess.Popen(command) as process:
        # Without these handlers a signal would end this process, and the training would run on without it.
        previous = {
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _parse(argv: Sequence[str]) -> Demo:
    parser = argparse.ArgumentParser(
        prog="apollo-sft demo",
        description="Makes data and a small model, trains it (about a minute on two cores), and shows what it learned.",
    )
    parser.add_argument("--folder", type=Path, default=Path("apollo-demo"), help="where to write [apollo-demo]")
    parser.add_argument("--seed", type=int, default=1, help="of the data, the model and the training [1]")
    parser.add_argument("--steps", type=int, default=900, help="training steps [900]")
    parser.add_argument("--nproc", type=int, default=None, help="processes [one per GPU, or 2 without a GPU]")
    given = parser.parse_args(argv)
    if given.steps < 1 or (given.nproc is not None and given.nproc < 1):
        parser.error("--steps and --nproc must be at least 1")
    return Demo(given.folder, given.seed, given.steps, given.nproc or torch.cuda.device_count() or 2)


def _program() -> list[str]:
    """Return the `apollo-sft` of this environment, as short as it can be typed here."""
    script = Path(sys.executable).with_name("apollo-sft")
    if not script.exists():
        return [sys.executable, "-m", "apollo_sft.cli.main"]

    here = Path.cwd()
    if script.is_relative_to(here):
        script = script.relative_to(here)
    return [str(script)]


def _claim(demo: Demo) -> None:
    """Take a new or empty folder, or one of an earlier demo. Raises: ConfigError for any other."""
    marker = demo.folder / MARKER
    if demo.folder.exists() and not marker.exists() and any(demo.folder.iterdir()):
        raise ConfigError(
            f"--folder {demo.folder} was not made by the demo",
            found="files that the demo did not write",
            expected="no folder, an empty one, or one of an earlier demo",
            fix="give another one: apollo-sft demo --folder NAME",
        )

    demo.folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"seed": demo.seed, "steps": demo.num_steps}) + "\n", encoding="utf-8")


def _prepare(demo: Demo) -> None:
    write_word_problems(demo.folder / "data", NUM_TRAIN, NUM_HELD_OUT, demo.seed)
    rows = pq.read_table(demo.data("single_turn", "train"), columns=["extra_info"])["extra_info"].to_pylist()
    texts: list[str] = []
    for row in rows:
        texts += [row["question"], row["answer"]]
    write_base_model(demo.base_model, texts, demo.seed)


def _read_held_out(demo: Demo) -> HeldOut:
    rows = pq.read_table(demo.data("single_turn", "test"), columns=["extra_info"])["extra_info"].to_pylist()
    return HeldOut([row["question"] for row in rows], [row["answer"] for row in rows])


def _answer(folder: Path, held_out: HeldOut) -> list[str]:
    model, tokenizer = load_for_generation(folder)
    return generate_answers(model, tokenizer, held_out.questions, MAX_ANSWER_TOKENS, batch_size=100)


def _print_prepared(console: Console, held_out: HeldOut) -> None:
    console.print(
        f"{NUM_TRAIN} word problems to train on and {len(held_out.questions)} held out: no held-out question is in the "
        "training data.\nA Qwen3-style model of 0.7 M parameters with random weights, and a tokenizer of its own.\n"
        f"What the untrained model answers to three held-out questions:\n"
    )


def _print_answers(console: Console, held_out: HeldOut, answers: dict[str, list[str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for i in held_out.examples():
        table.add_row("question", Text(held_out.questions[i], style="bold"))
        for name, texts in answers.items():
            table.add_row(name, shown(texts[i], is_right(texts[i], held_out.truths[i])))
        table.add_row("", "")

    console.print(table)


def _print_command(console: Console, command: Sequence[str]) -> None:
    """Print a command, one argument a line. Never wrapped: a wrapped command cannot be pasted."""
    words = [shlex.quote(word) for word in command]
    start = next((i for i, word in enumerate(command) if "=" in word), len(words))
    lines = [" ".join(words[:start]), *words[start:]]
    console.print(Text(" \\\n    ".join(lines), style="cyan"), soft_wrap=True)
    console.print()


def _print_result(console: Console, held_out: HeldOut, before: list[str], after: list[str], seconds: float) -> bool:
    share_before = exact_match(before, held_out.truths)
    share_after = exact_match(after, held_out.truths)
    learned = share_after >= ENOUGH
    console.print(f"{len(held_out.questions)} held-out questions, {seconds:.0f} seconds of training:")
    console.print(f"exact match before: {100 * share_before:.3g} %")
    style = "bold red"
    if learned:
        style = "bold green"

    console.print(f"exact match after: {100 * share_after:.3g} %", style=style)
    if learned:
        console.print(
            f"\nWhat this shows: the model learned to read twelve kinds of question and the table of sums from 0 to "
            f"{LARGEST} behind them.\nIt did not learn arithmetic: other numbers or other words are new to it."
        )
    else:
        console.print(f"\nTraining failed to learn: at least {100 * ENOUGH:.0f} % was expected.")

    return learned


def _print_next(console: Console, demo: Demo) -> None:
    console.rule("[bold]4  Where everything is, and what to try next")
    table = Table(box=None, show_header=False, pad_edge=False)
    for path, what in (
        (demo.data("single_turn", "train").parent, "one question and answer a row"),
        (demo.data("multiturn", "train").parent, "the same as conversations"),
        (demo.base_model, "the untrained model"),
        (demo.trained_model, "the trained model: open it with from_pretrained, vLLM or an RL trainer"),
        (demo.trained_model / "metrics.jsonl", "loss, learning rate, speed of every step"),
    ):
        table.add_row(Text(str(path)), Text(what, style="dim"))

    console.print(table)

    # The commands use the paths of this demo: they can be pasted as they are.
    own = ["data.train_files=my.parquet", "data.val_files=null", f"model.partial_pretrain={demo.trained_model}"]
    hub = [
        f"data.train_files={demo.data('single_turn', 'train')}",
        f"data.val_files={demo.data('single_turn', 'test')}",
        "data.prompt_key=extra_info",
        "data.response_key=extra_info",
        "model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct",
        "data.train_batch_size=64",
    ]
    train = [*_program(), "train"]

    console.print("\n[bold]The multi-turn file:")
    _print_command(console, training_command(demo, "multiturn"))
    console.print("[bold]Your own data[/] (a parquet file with the columns question and answer):")
    _print_command(console, [*train, *own, "trainer.default_local_dir=my-model"])
    console.print("[bold]A model from the hub, on every GPU of this machine:")
    _print_command(console, [*train, *hub, "trainer.total_epochs=1", "trainer.default_local_dir=my-qwen"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
