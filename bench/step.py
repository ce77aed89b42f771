"""Our step against a bare PyTorch loop over the same packed micro-batches: tokens/s, ours over the bare loop's.

    python bench/step.py [--pairs N] [--steps N] [--rows N] [--bf16-rows N] [--cases fp32-full-1,…] [--write]

Ours: batches from the loader, the step, the metrics written down, as the trainer runs them. Bare: the same model and
attention function, forward, cross-entropy of the logits of the target rows, backward, clip, fused AdamW, one reading of
the loss; bf16 by autocast on one rank, by FSDP2's mixed precision on two; batches lie ready. One thread a rank.

Autocast keeps weights in bf16 from the forward to the backward. So does ours in the cases that end in `kept`, by
model.fsdp_config.reshard_after_forward=false; by default it forms them twice, and holds those of one layer at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import about_bf16, bf16_rows, over, table, verdict, write_ratios, write_section
from workload import LONGEST, SHORTEST, write_model, write_store

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader, StepBatch
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, load
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.report.sinks import RunInfo
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.meter import meter_of
from apollo_sft.train.optim.build import Schedule
from apollo_sft.train.reporter import Reporter
from apollo_sft.train.step import train_step
from apollo_sft.types import IGNORE_INDEX, MicroBatch

WANTED = 0.97
CASES = [f"{dtype}-{what}-{ranks}" for ranks in (1, 2) for dtype in ("fp32", "bf16") for what in ("full", "lora")]
CASES += ["bf16-full-1-kept", "bf16-lora-1-kept"]
RATE, BETAS, CLIP, LORA_RANK = 1e-4, (0.9, 0.95), 1.0, 16

Steps = Callable[[int], list[float]]
"""Runs so many of the next steps; their losses."""


def ranks_of(case: str) -> int:
    return int(case.split("-")[2])


def config_of(folder: Path, case: str, rows: int) -> Any:
    dtype, what, _, *kept = case.split("-")
    keys = [f"model.partial_pretrain={folder / 'model'}", "data.train_files=none", "data.val_files=null"]
    keys += [f"data.train_batch_size={rows}", f"data.micro_batch_size_per_gpu={max(1, rows // 4)}"]
    keys += [f"model.fsdp_config.dtype={dtype}", f"model.lora_rank={LORA_RANK if what == 'lora' else 0}"]
    keys += ["trainer.logger=[file]", "trainer.device=cpu", f"trainer.default_local_dir={folder / 'run'}"]
    keys += [f"optim.lr={RATE}", "optim.weight_decay=0.01", f"model.fsdp_config.reshard_after_forward={not kept}"]
    return compose(keys).config


class Ours:
    def __init__(self, config: Any, folder: Path, world: World, loader: Loader, mesh: Any) -> None:
        hf_config = load.read_config(folder / "model", False)
        self.world, self.config = world, config
        self.model, self.optimizer = assemble(config, folder / "model", hf_config, world, mesh)
        self.schedule = Schedule("cosine", RATE, 10**6, 0, 1.0, 1.0)
        info = RunInfo(folder / "run", "bench", "step", {}, 0) if world.is_main else None
        self.reporter = Reporter(config.trainer, info, 10**6)
        self.meter = meter_of(config.trainer, config.model, self.model.causal_lm, world, 100, None)
        self.batches = self.meter.batches(loader.batches(range(10**6)))

    def __call__(self, num_steps: int) -> list[float]:
        losses = []
        for batch in islice(self.batches, num_steps):
            rate = self.schedule.rate(batch.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            result = train_step(self.model, self.optimizer, batch, self.world, CLIP)
            self.reporter.record(self.meter.record(batch, result, rate))
            losses.append(result.loss)
        return losses


class Bare:
    """What one would write by hand. `batches`: those of all steps."""

    def __init__(self, config: Any, folder: Path, world: World, batches: Iterator[StepBatch]) -> None:
        from transformers import AutoModelForCausalLM

        self.world, self.batches = world, batches
        self.bf16 = config.model.fsdp_config.dtype == "bf16"
        adapted = config.model.lora_rank > 0
        frozen = torch.bfloat16 if self.bf16 and adapted else torch.float32
        causal_lm = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=frozen, attn_implementation=attention.NAME
        )
        model: Any = causal_lm
        if adapted:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(causal_lm, LoraConfig(r=LORA_RANK, target_modules="all-linear"))
        model.train()
        self.backbone, self.head = causal_lm.model, causal_lm.lm_head
        if world.size > 1:
            self._shard(model)
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, betas=BETAS, weight_decay=0.01, fused=True)

    def _shard(self, model: Any) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else MixedPrecisionPolicy()
        for layer in self.backbone.layers:
            fully_shard(layer, mp_policy=policy)
        model.loss_sum = self.loss_sum
        fully_shard(model, mp_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(model, "loss_sum")

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        hidden = self.backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            document_starts=batch.document_starts,
            longest_document=int(torch.diff(batch.document_starts).max()),
        ).last_hidden_state[0]
        at = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        logits = self.head(hidden[at])
        return torch.nn.functional.cross_entropy(logits.float(), batch.labels[0][at], reduction="sum")

    def __call__(self, num_steps: int) -> list[float]:
        losses = []
        loss_of = self.model.loss_sum if self.world.size > 1 else self.loss_sum
        for batch in islice(self.batches, num_steps):
            self.optimizer.zero_grad()
            total = torch.zeros(())
            for micro_batch in batch.micro_batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and self.world.size == 1):
                    loss = loss_of(micro_batch)
                (loss * (self.world.size / batch.num_targets)).backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            losses.append(float(total) / batch.num_targets)
        return losses


def timed(run: Steps, num_steps: int, world: World) -> tuple[float, float, list[float]]:
    """CPU seconds of all ranks, wall seconds of the slowest, losses."""
    if world.size > 1:
        dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    losses = run(num_steps)
    took = torch.tensor([time.process_time() - cpu, time.perf_counter() - began], dtype=torch.float64)
    if world.size > 1:
        every = [torch.empty_like(took) for _ in range(world.size)]
        dist.all_gather(every, took)
        took = torch.stack([torch.stack(every)[:, 0].sum(), torch.stack(every)[:, 1].max()])
        shared = torch.tensor(losses)
        dist.all_reduce(shared)
        losses = losses if run.__class__ is Ours else shared.tolist()
    return float(took[0]), float(took[1]), losses


def in_pair(ours: Steps, bare: Steps, num_steps: int, world: World, number: int) -> tuple[Any, Any]:
    """Both, one after the other; which comes first changes from pair to pair."""
    if number % 2:
        theirs = timed(bare, num_steps, world)
        return timed(ours, num_steps, world), theirs
    return timed(ours, num_steps, world), timed(bare, num_steps, world)


def measure(folder: Path, out: Path, options: argparse.Namespace) -> None:
    """All cases of this number of processes. The first pair is not counted: its losses are compared."""
    torch.set_num_threads(1)
    (folder / "run").mkdir(exist_ok=True)
    for case in options.cases:
        if ranks_of(case) != int(os.environ["WORLD_SIZE"]):
            continue
        rows = max(ranks_of(case), options.bf16_rows if "bf16" in case else options.rows)
        world = launch.start("cpu", needs_group="bf16" in case)
        config = config_of(folder, case, rows)
        mesh = build_mesh(world, 1, -1)
        spec = plan_spec(config.data, config.trainer.seed, mesh, load.read_config(folder / "model", False))
        loader = Loader(SampleStore(folder / "store"), spec, mesh.dp_rank)
        ours = Ours(config, folder, world, loader, mesh)
        ready = [loader.batch(step) for step in range(1 + options.steps * options.pairs)]
        bare = Bare(config, folder, world, iter(ready))
        numbers = range(1 + options.pairs)
        pairs = [in_pair(ours, bare, 1 if number == 0 else options.steps, world, number) for number in numbers]
        figures = {
            "case": case,
            "tokens": sum(batch.num_tokens for batch in ready[1:]),
            "ours": [one[:2] for one, _ in pairs[1:]],
            "bare": [other[:2] for _, other in pairs[1:]],
            "apart": abs(pairs[0][0][2][0] / pairs[0][1][2][0] - 1),
        }
        if world.is_main:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
        del ours, bare, loader, mesh
        launch.stop()
    sys.stdout.flush()
    os._exit(0)  # what holds a group of gloo at exit aborts the process


def run_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "figures.jsonl"
        write_model(folder / "model", options.hidden, options.layers)
        write_store(folder / "store", options.rows * (1 + options.steps * options.pairs), (SHORTEST, LONGEST))
        for processes in sorted({ranks_of(case) for case in options.cases}):
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *start, __file__, *sys.argv[1:], "--worker", name, str(out)]
            command += ["--bf16-rows", str(options.bf16_rows)]
            finished = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if finished.returncode:
                sys.exit(finished.stderr)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each half of a pair")
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--bf16-rows", type=int, help="of a batch in bf16; fewer where that is slow")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=CASES)
    parser.add_argument("--write", action="store_true", help="write results.md and recorded.json")
    parser.add_argument("--ratios", type=Path, help="write the ratios of the pairs there")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.bf16_rows = options.bf16_rows or bf16_rows(options.rows)
    if options.worker:
        measure(Path(options.worker[0]), Path(options.worker[1]), options)
    rows, ratios = [], {}
    for found in run_cases(options):
        cpu, wall = (over([b[i] for b in found["bare"]], [o[i] for o in found["ours"]]) for i in (0, 1))
        speeds = [found["tokens"] / sum(pair[0] for pair in found[who]) for who in ("ours", "bare")]
        pairs = zip(found["bare"], found["ours"], strict=True)
        ratios[found["case"]] = [other[0] / one[0] for other, one in pairs]
        numbers = [f"{speed:.0f}" for speed in speeds]
        met = verdict(cpu.median, WANTED, at_least=True)
        rows.append([found["case"], *numbers, cpu, wall, f"{found['apart']:.1e}", met])
    titles = ["case", "ours, tokens/CPU-s", "bare, tokens/CPU-s", "CPU time ratio", "wall time ratio", "loss apart", ""]
    print(table(titles, rows))
    if options.ratios:
        write_ratios("step", ratios, options.ratios)
    if options.write:
        write_ratios("step", ratios)
        write_section("step", "\n\n".join([__doc__ or "", about_bf16(), table(titles, rows)]))


if __name__ == "__main__":
    main()
