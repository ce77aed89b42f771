"""The whole of `python -m apollo_sft`, in turns. Arguments: one JSON object."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from turns import Turns

from apollo_sft.config.compose import compose
from apollo_sft.train import prepare_run, run
from apollo_sft.train.reporter import Reporter


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    turns, out = Turns(options["every"]), Path(options["out"])
    loop, record, store, export = run.run_loop, Reporter.record, prepare_run.prepare_store, run.export
    times: dict[str, float] = {}

    def timed_loop(*arguments: Any) -> None:
        turns.begin()
        loop(*arguments)

    def timed_export(*arguments: Any) -> None:
        began = time.perf_counter()
        export(*arguments)
        times["saving"] = time.perf_counter() - began

    def timed_record(self: Reporter, values: dict[str, Any]) -> None:
        record(self, values)
        turns.step(values["train/loss"])

    def timed_store(*arguments: Any) -> Any:
        began = sum(os.times()[:4])  # children too: several processes may share the work
        made = store(*arguments)
        turns.facts["preparation_rows_per_second"] = options["rows"] / (sum(os.times()[:4]) - began)
        return made

    run.run_loop, run.export, prepare_run.prepare_store = timed_loop, timed_export, timed_store
    Reporter.record = timed_record  # type: ignore[method-assign]
    composed = compose(
        [
            f"model.partial_pretrain={options['model']}",
            f"data.train_files={options['data']}",
            "data.val_files=null",
            "data.prompt_key=prompt",
            "data.response_key=response",
            "data.prompt_dict_keys=null",
            "data.response_dict_keys=null",
            f"data.train_batch_size={options['batch']}",
            f"data.micro_batch_size_per_gpu={max(1, options['batch'] // 4)}",
            f"data.store_dir={out / 'store'}",
            f"model.fsdp_config.dtype={options['dtype']}",
            f"optim.lr={options['rate']}",
            "optim.weight_decay=0.0",
            "optim.warmup_steps_ratio=0.0",
            "optim.min_lr_ratio=1.0",
            f"trainer.total_training_steps={options['steps']}",
            f"trainer.default_local_dir={out / 'run'}",
            "trainer.checkpoint.save_contents=[model,optimizer,extra]",
            f"trainer.save_freq={10**6}",
            "trainer.logger=[file]",
            "trainer.device=cpu",
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run.train(composed.config, composed.overridden, composed.notes)
    turns.end(out / "run", times["saving"])


if __name__ == "__main__":
    main()
