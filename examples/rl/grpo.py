"""GRPO from an SFT folder, on a CPU in minutes: python -m examples.rl.grpo [--seed N] [--out FOLDER] …

Word problems, a model that SFT was stopped early on, then TRL's GRPOTrainer on that folder. Exit code 0 when the mean
reward on held-out questions rose by more than noise, 1 when it did not, 2 when something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from apollo_sft.cli.demo import Demo
from apollo_sft.errors import ApolloError, ConfigError, DataError
from examples.rl.reward import MAX_ANSWER_TOKENS, Rise, reward, score
from examples.rl.start import Ids, read_sft_run, train_stopped_early

NUM_SAMPLES = 4
NUM_ERRORS = 3.0
"""The sampled mean reward has to rise by more than this many standard errors."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`num_prompts` different questions a step, each answered `num_generations` times."""

    num_steps: int
    seed: int
    num_prompts: int = 16
    num_generations: int = 8
    learning_rate: float = 2e-4
    num_warmup_steps: int = 10


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    given = _parse(argv)
    console = Console(highlight=False)
    transformers_logging.disable_progress_bar()
    try:
        risen = _run(given, console)
    except ApolloError as error:
        console.print(f"[bold red]{type(error).__name__}[/]", end=" ")
        console.print(str(error), markup=False)
        return 2
    return 0 if risen else 1


def _run(given: argparse.Namespace, console: Console) -> bool:
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("TRL is not installed", fix="pip install 'apollo-sft[rl]'")
    demo = Demo(given.out, given.seed, given.sft_steps, 1)
    settings = Settings(given.steps, given.seed)
    seconds = {}
    started = time.monotonic()
    if given.model is None:
        console.rule("[bold]1  SFT, stopped early")
        train_stopped_early(demo, given.held_out)
    start = given.model or demo.trained_model
    sft = read_sft_run(start, given.held_out)
    seconds["sft"] = time.monotonic() - started
    before = score(start, sft.held_out.rows, NUM_SAMPLES, given.seed)

    console.rule(f"[bold]2  GRPO from {start}")
    started = time.monotonic()
    trained = demo.folder / "rl-model"
    num_sampled = run_grpo(start, sft.train.rows, sft.train.prompts, settings, trained)
    seconds["rl"] = time.monotonic() - started
    after = score(trained, sft.held_out.rows, NUM_SAMPLES, given.seed)

    console.rule("[bold]3  Held-out questions, before and after")
    rises = {
        "sampled": Rise.of(before.sampled, after.sampled),
        "greedy": Rise.of(before.greedy, after.greedy),
    }
    risen = rises["sampled"].exceeds_noise(NUM_ERRORS)
    _show(console, rises, risen)
    console.print(f"{num_sampled} different prompts were sampled from; each is, token for token, one of SFT's.")
    result = {
        "risen": risen,
        **{name: rise.record() for name, rise in rises.items()},
        "samples_per_question": NUM_SAMPLES,
        "prompts_sampled_from": num_sampled,
        "grpo": asdict(settings),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "sft_model": str(start),
        "rl_model": str(trained),
    }
    path = demo.folder / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"The figures are in {path}.")
    return risen


def run_grpo(
    model: Path,
    rows: list[dict[str, Any]],
    allowed: Collection[Ids],
    settings: Settings,
    out: Path,
) -> int:
    """Train the model of a folder on the rewards of its answers and save it to `out`.

    `allowed`: token ids of prompts. Every prompt that is sampled from has to be one of them.
    Returns how many different prompts were sampled from. Raises: DataError for another prompt.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(out),
        seed=settings.seed,
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.num_prompts * settings.num_generations,
        num_generations=settings.num_generations,
        max_completion_length=MAX_ANSWER_TOKENS,
        temperature=1.0,
        beta=0.0,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.num_warmup_steps,
        adam_beta2=0.99,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=min(10, settings.num_steps),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(str(model), reward, config, Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    seen = SeenPrompts(trainer.model, frozenset(allowed))
    trainer.train()
    trainer.save_model(str(out))
    return len(seen.prompts)


class Progress(TrainerCallback):
    """One line every ten steps, in the place of TRL's twenty figures."""

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            print(f"step {state.global_step}/{state.max_steps}: mean reward {float(logs['reward']):.3f}", flush=True)


class SeenPrompts:
    """Stands before `model.generate` and notes every prompt. Raises: DataError for one that is not `allowed`."""

    def __init__(self, model: Any, allowed: frozenset[Ids]) -> None:
        self.prompts: set[Ids] = set()
        self.allowed = allowed
        self.generate = model.generate
        model.generate = self

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
        """Shapes (samples, tokens), padded on the left."""
        pairs = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        new = {tuple(token for token, real in zip(*pair, strict=True) if real) for pair in pairs}
        if foreign := new - self.allowed:
            raise DataError("RL samples from a prompt that SFT did not train", found=f"the tokens {min(foreign)}")
        self.prompts |= new
        return self.generate(input_ids=input_ids, attention_mask=attention_mask, **rest)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.rl.grpo", description="GRPO from an SFT folder.")
    parser.add_argument("--out", type=Path, default=Path("apollo-rl"), help="where to write [apollo-rl]")
    parser.add_argument("--model", type=Path, help="start from this output folder of apollo-sft train, on its data")
    parser.add_argument("--seed", type=int, default=0, help="of data, model, SFT, GRPO and evaluation [0]")
    parser.add_argument("--sft-steps", type=int, default=150, help="steps of SFT before it is stopped [150]")
    parser.add_argument("--steps", type=int, default=150, help="steps of GRPO [150]")
    parser.add_argument("--held-out", type=int, default=400, help="questions to evaluate on [400]")
    given = parser.parse_args(argv)
    if min(given.sft_steps, given.steps) < 1 or given.held_out < 2:
        parser.error("--sft-steps and --steps must be at least 1, --held-out at least 2")
    return given


def _show(console: Console, rises: dict[str, Rise], risen: bool) -> None:
    table = Table(title="mean reward", title_justify="left")
    for name in ("answers", "questions", "before", "after", "difference", "standard error"):
        table.add_column(name, justify="left" if name == "answers" else "right")
    for name, rise in rises.items():
        numbers = (f"{value:.3f}" for value in (rise.before, rise.after, rise.difference, rise.error))
        table.add_row(name, str(rise.num_questions), *numbers)
    console.print(table)
    if risen:
        console.print(f"The reward rose by more than {NUM_ERRORS:g} standard errors.", style="bold green")
    else:
        console.print(f"The reward did not rise by more than {NUM_ERRORS:g} standard errors.", style="bold red")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
