"""What planning costs one rank of a large job: CPU time to the first step, of a step and an epoch, and memory.

    python bench/plan.py [--samples N] [--ranks N] [--per-rank N] [--steps N]

Lengths lie in a memory-mapped file, as in a store. Every way of planning runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from apollo_sft.data.batch.mixture import Mixture, Part, mixture
from apollo_sft.data.batch.plan import PlanSpec, attention_cost, plan, steps_per_epoch

CHUNK = 2**22
LONGEST = 4096
WAYS = {
    "equal counts": {},
    "balanced": {"balance": True},
    "token-capped": {"max_tokens": 2 * LONGEST},
    "balanced, token-capped": {"balance": True, "max_tokens": 2 * LONGEST},
    "a mixture": {},
}
"""Options of each. The mixture: three sources of 90, 9 and 1 % of the samples, with equal weights."""


def write_lengths(path: Path, num_samples: int) -> None:
    """Log-normal lengths around 300 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.lib.format.open_memmap(path, "w+", np.int32, (num_samples,))
    for first in range(0, num_samples, CHUNK):
        part = lengths[first : first + CHUNK]
        part[:] = rng.lognormal(5.7, 0.8, len(part)).clip(1, LONGEST)
    lengths.flush()


def mixed(num_samples: int) -> Mixture:
    sizes = [9 * num_samples // 10, 9 * num_samples // 100]
    sizes.append(num_samples - sum(sizes))
    return mixture([Part(name, weight=1.0) for name in "abc"], sizes, "bench")


def private_bytes() -> int:
    """Memory that this process shares with no file and no other process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(path: Path, spec: PlanSpec, num_steps: int) -> dict[str, float]:
    """What the loader of rank 0 asks for, at steps spread over two epochs."""
    before, began = private_bytes(), time.process_time()
    lengths = np.load(path, mmap_mode="r")
    in_epoch = steps_per_epoch(len(lengths), spec)
    wanted = np.linspace(0, 2 * in_epoch - 1, num_steps + 1).astype(int).tolist()
    seconds, most, imbalances = [], 0, []
    for step in wanted:
        planned = plan(lengths, spec, step)
        planned.micro_batches(0)
        lengths[planned.samples].sum(dtype=np.int64)
        seconds.append(time.process_time() - began)
        most = max(most, private_bytes() - before)
        imbalances.append(planned.imbalance())
        began = time.process_time()
    each = sum(seconds[1:]) / num_steps
    return {
        "first": seconds[0],
        "step": each,
        "epoch": each * in_epoch,
        "private": most,
        "imbalance": sum(imbalances) / len(imbalances),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, default=10_000, help="data ranks")
    parser.add_argument("--per-rank", type=int, default=16, help="samples of one rank and step")
    parser.add_argument("--steps", type=int, default=20, help="steps to measure")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    spec = {"batch_size": options.ranks * options.per_rank, "micro_batch_size": 4, "dp_size": options.ranks, "seed": 1}
    if options.measure:
        file, way = options.measure
        spec |= WAYS[way] | ({"mixture": mixed(options.samples)} if way == "a mixture" else {})
        figures = measure(Path(file), PlanSpec(**spec, attention_cost=attention_cost(4096)), options.steps)
        print(json.dumps(figures))
        return
    in_epoch = steps_per_epoch(options.samples, PlanSpec(**spec))
    print(f"{options.samples:,} samples, {options.ranks:,} data ranks, {options.per_rank} samples a rank and step:")
    print(f"{in_epoch:,} steps an epoch\n")
    print(f"{'':<24}{'first step':>12}{'a step':>12}{'an epoch':>12}{'memory':>10}{'max/mean':>10}")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "lengths.npy")
        write_lengths(Path(file), options.samples)
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", file, way]
            f = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{way:<24}{f['first'] * 1e3:>9.1f} ms{f['step'] * 1e3:>9.1f} ms{f['epoch']:>10.1f} s"
                f"{f['private'] / 2**20:>7.1f} MB{f['imbalance']:>10.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
