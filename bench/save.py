"""What a step waits for a checkpoint, synchronous and asynchronous, with hf/ and without; in steps, in one process.

    python bench/save.py [--hidden N] [--layers N] [--every STEPS] [--saves N]

stall: from the end of the step that saves to the beginning of the next. all: what a checkpoint adds to the run's time,
with what its writing in the background takes from the steps beside it. copy: bytes of CPU memory for that writing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from apollo_sft.checkpoint.run_folder import state
from apollo_sft.config.compose import compose
from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import write_word_problems
from apollo_sft.train import saving
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.run import train

WITHOUT_HF = "trainer.checkpoint.save_contents=[model,optimizer,extra]"
SYNCHRONOUS = "trainer.checkpoint.async_save=false"
CASES = {
    "no checkpoint": ["trainer.save_freq=1000000", SYNCHRONOUS],
    "synchronous": [SYNCHRONOUS],
    "synchronous, no hf/": [SYNCHRONOUS, WITHOUT_HF],
    "asynchronous": [],
    "asynchronous, no hf/": [WITHOUT_HF],
}


@dataclass
class Times:
    """`ends` of steps, and how long `after_step` took after each."""

    ends: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    copied_bytes: int = 0

    def seconds(self) -> float:
        """From the end of the first step to that of the last; what follows the last is the same in every case."""
        return self.ends[-1] - self.ends[0]


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    write_word_problems(folder / "data", 400, 8, seed=1)
    write_base_model(folder / "model", ["Ann has 3 pens. #### 3", "How many pens does Ann have?"] * 20, seed=1)
    config = AutoConfig.from_pretrained(folder / "model")
    config.hidden_size, config.intermediate_size = options.hidden, 4 * options.hidden
    config.num_hidden_layers, config.layer_types = options.layers, ["full_attention"] * options.layers
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def measure(folder: Path, out: Path, keys: list[str], options: argparse.Namespace) -> Times:
    times = Times()
    after_step, snapshot = Checkpoints.after_step, state.snapshot

    def timed(self: Checkpoints, *arguments: Any) -> None:
        began = time.perf_counter()
        after_step(self, *arguments)
        times.ends.append(began)
        times.waits.append(time.perf_counter() - began)

    def counted(*arguments: Any, copy: bool) -> dict[str, Any]:
        tensors = snapshot(*arguments, copy=copy)
        times.copied_bytes = copy * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return tensors

    table = folder / "data" / "single_turn" / "train.parquet"
    steps = options.every * options.saves + 2
    composed = compose(
        [
            f"model.partial_pretrain={folder / 'model'}",
            f"data.train_files={table}",
            "data.val_files=null",
            "data.prompt_key=extra_info",
            "data.response_key=extra_info",
            "data.train_batch_size=16",
            f"data.store_dir={folder / 'store'}",
            "trainer.device=cpu",
            "trainer.logger=[file]",
            f"trainer.default_local_dir={out}",
            f"trainer.total_training_steps={steps}",
            f"trainer.save_freq={options.every}",
            *keys,
        ]
    )
    Checkpoints.after_step, saving.snapshot = timed, counted  # type: ignore[method-assign,assignment]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            train(composed.config, composed.overridden, composed.notes)
    finally:
        Checkpoints.after_step, saving.snapshot = after_step, snapshot  # type: ignore[method-assign]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--saves", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder, options)
        measure(folder, folder / "warm-up", CASES["no checkpoint"], options)
        step = 0.0
        for number, (name, keys) in enumerate(CASES.items()):
            times = measure(folder, folder / f"run-{number}", keys, options)
            if not step:
                step = times.seconds() / (len(times.ends) - 1)
                print(f"a step takes {step:.3f} s\n{'':24}{'stall, steps':>14}{'all, steps':>14}{'copy, bytes':>18}")
            stalls = times.waits[options.every - 1 : -1 : options.every]
            extra = (times.seconds() - step * (len(times.ends) - 1)) / options.saves
            stall = statistics.median(stalls) / step
            print(f"{name:24}{stall:>14.2f}{extra / step:>14.2f}{times.copied_bytes:>18}")


if __name__ == "__main__":
    main()
