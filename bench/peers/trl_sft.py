"""TRL's SFTTrainer on the same rows, in turns; runs in TRL's own environment. Arguments: one JSON object."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from turns import Turns


class TurnsCallback(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turns.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        del args, state, control
        if "loss" in logs:
            self.turns.facts["losses"].append(logs["loss"])


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    turns, out = Turns(options["every"]), Path(options["out"])
    rows = load_dataset("parquet", data_files=options["data"], split="train", cache_dir=str(out / "cache"))
    rows = rows.select_columns(["prompt", "completion"])
    settings = {
        "output_dir": str(out / "run"),
        "use_cpu": True,
        "bf16": options["dtype"] == "bf16",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": options["batch"],
        "max_steps": options["steps"],
        "max_length": 1024,
        "learning_rate": options["rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataset_num_proc": None,
        "seed": 1,
    }
    config = SFTConfig(**settings | options["trl"])
    with contextlib.redirect_stdout(sys.stderr):
        prepare = SFTTrainer._prepare_dataset

        def timed_prepare(*arguments: Any, **more: Any) -> Any:
            began = time.process_time()
            made = prepare(*arguments, **more)
            turns.facts["preparation_rows_per_second"] = len(made) / (time.process_time() - began)
            return made

        SFTTrainer._prepare_dataset = timed_prepare
        trainer = SFTTrainer(model=options["model"], args=config, train_dataset=rows, callbacks=[TurnsCallback(turns)])
        trainer.train()
        began = time.perf_counter()
        trainer.save_model(str(out / "model"))
    turns.end(out / "model", time.perf_counter() - began)


if __name__ == "__main__":
    main()
