"""Ours against TRL's SFTTrainer and verl's SFT trainer, each whole and in its own environment: tokens per CPU second.

    python bench/peers.py [--peers trl,…] [--steps N] [--batch N] [--bf16-batch N] [--environments FOLDER] [--write]

The same model file, rows, order, constant learning rate, AdamW, clip; no dropout, no weight decay. The programs take
turns within one run, a fifth of the steps at a time: those are the interleaved pairs. The environments are made once,
from bench/peers/requirements-*.txt. One thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record import about_bf16, bf16_rows, over, table, verdict, write_section
from workload import write_conversations, write_model

HERE = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True, slots=True)
class Program:
    """`peer`: whose environment and script it is. `wanted`: how much faster ours is to be, by dtype.

    `settings`: other keys of TRL's SFTConfig.
    """

    title: str
    peer: str
    wanted: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


TRL, VERL = {"fp32": 2.6, "bf16": 3.5}, {"bf16": 2.0}
PROGRAMS = {
    "ours": Program("apollo-sft", "ours"),
    "trl": Program("TRL, padded", "trl", TRL),
    "trl-flat": Program("TRL, padding-free", "trl", TRL, {"padding_free": True, "max_length": None}),
    "verl": Program("verl", "verl", VERL),
}
SCRIPTS = {"ours": "ours.py", "trl": "trl_sft.py", "verl": "verl_sft.py"}
NOTES = """
Losses: all are the sum over target tokens divided by the targets of the batch; TRL divides by `num_items_in_batch`,
verl by `batch_num_tokens`. Ours packs, in four forwards a step. TRL pads, or lays a batch in one row with a mask
(`padding_free`); its default loss, at targets, in chunks (`nll`); SDPA. Its packing makes other batches, and grouping
by length another order, so neither stands here. verl pads, with FSDP2 on one rank. None checkpoints activations.
Preparation: ours proves every target and writes a store; TRL tokenises, with a mask; verl tokenises in its data loader,
again in every epoch. Saving: ours writes the model and checks the files; TRL writes it; verl writes a checkpoint that
holds the Hugging Face form only.

verl 0.9.1 does not run on a CPU as shipped. Added from outside, in `bench/peers/verl_sft.py`: a platform `cpu`
(device functions that do nothing or are torch's own), the registration of verl's FSDP engine for it, and SDPA for
attention. With bf16 it adds up its loss in bfloat16, which rounds it by up to 0.4 %: what is compared here is the sum
of its own log-probabilities in float64, each of which it still forms in bfloat16.

Without bfloat16 instructions four fifths of a step in bf16 are products of matrices (ours, by torch's profiler), which
every program has to make: there the ratios come close to those of the tokens that are computed, padding included.
"""
RATE = 1e-3
TURNS = 5
LOSS_APART = 1e-3


def environment(name: str, folder: Path) -> str:
    """Its Python. Made when it is not there."""
    if name == "ours":
        return sys.executable
    python = folder / name / "bin" / "python"
    if not (folder / name / ".made").is_file():
        print(f"making the environment of {name} in {folder / name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / f"requirements-{name}.txt")]
        subprocess.run(install, check=True)
        (folder / name / ".made").touch()
    return str(python)


def plan_order(num_rows: int, batch: int) -> np.ndarray:
    from apollo_sft.data.batch.plan import PlanSpec, plan

    spec = PlanSpec(batch_size=batch, micro_batch_size=batch, dp_size=1, seed=1)
    lengths = np.ones(num_rows, dtype=np.int32)
    return np.concatenate([plan(lengths, spec, step).samples for step in range(num_rows // batch)])


def write_rows(folder: Path, batch: int, steps: int) -> dict[str, Path]:
    """The file of each program: each reads it in its own order, which gives the same order of rows."""
    import torch

    rows = pq.read_table(folder / "model" / "rows.parquet").slice(0, batch * steps)
    ours = folder / f"rows-{batch}.parquet"
    pq.write_table(rows, ours)
    prompts, responses = rows["prompt"].to_pylist(), rows["response"].to_pylist()
    order = plan_order(len(rows), batch)
    turn = [[{"role": "user", "content": prompts[i]}, {"role": "assistant", "content": responses[i]}] for i in order]
    trl = folder / f"trl-{batch}.parquet"
    pq.write_table(pa.table({"prompt": [m[:1] for m in turn], "completion": [m[1:] for m in turn]}), trl)
    # verl's DistributedSampler shuffles with its default seed and the epoch, 0 and 0.
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    verl = folder / f"verl-{batch}.parquet"
    unshuffled = [turn[i] for i in np.argsort(places)]
    pq.write_table(pa.table({"messages": unshuffled}), verl)
    return {"ours": ours, "trl": trl, "verl": verl}


def start(name: str, folder: Path, options: dict[str, Any], environments: Path) -> subprocess.Popen[str]:
    out = folder / f"{name}-{options['dtype']}"
    out.mkdir()
    program = PROGRAMS[name]
    settings = options | {"model": str(folder / "model"), "out": str(out), "data": str(options["data"][program.peer])}
    settings["trl"] = program.settings
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name != "ours":
        variables.pop("PYTHONPATH", None)
    return subprocess.Popen(
        [environment(program.peer, environments), str(HERE / SCRIPTS[program.peer]), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(out / "stderr.txt").open("w"),
        text=True,
        env=variables,
    )


def wait_for(process: subprocess.Popen[str], word: str, errors: Path) -> str:
    assert process.stdout is not None, "it is a pipe"
    for line in process.stdout:
        if line.startswith(word):
            return line[len(word) :].strip()
    sys.exit(f"{errors} ends before {word}:\n" + errors.read_text(encoding="utf-8")[-3000:])


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None, "it is a pipe"
    process.stdin.write("\n")
    process.stdin.flush()


def take_turns(names: list[str], folder: Path, options: dict[str, Any], environments: Path) -> dict[str, Any]:
    """What each program tells at its end, and the wall seconds from its start to its first step's end."""
    processes, found = {}, {}
    for name in names:
        began = time.time()
        processes[name] = start(name, folder, options, environments)
        wait_for(processes[name], "TURN", folder / f"{name}-{options['dtype']}" / "stderr.txt")
        found[name] = time.time() - began
    for _ in range(TURNS):
        for name in names:
            go(processes[name])
            wait_for(processes[name], "TURN", folder / f"{name}-{options['dtype']}" / "stderr.txt")
    facts = {}
    for name in names:
        go(processes[name])
        text = wait_for(processes[name], "FACTS", folder / f"{name}-{options['dtype']}" / "stderr.txt")
        processes[name].wait(60)
        facts[name] = json.loads(text) | {"started": found[name]}
    return facts


def num_tokens(folder: Path, dtype: str) -> int:
    lines = (folder / f"ours-{dtype}" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["train/tokens"] for line in lines)


def report(title: str, dtype: str, facts: dict[str, Any], tokens: int) -> str:
    rows = []
    ours = facts["ours"]
    for name, found in facts.items():
        cpu, wall = (over([t[i] for t in found["turns"]], [t[i] for t in ours["turns"]]) for i in (0, 1))
        speed = tokens / sum(turn[0] for turn in found["turns"])
        apart = max(abs(a / b - 1) for a, b in zip(ours["losses"], found["losses"], strict=True))
        wanted = PROGRAMS[name].wanted.get(dtype)
        met = verdict(cpu.median, wanted, at_least=True) if wanted else ""
        curve = f"{apart:.1e}" + ("" if apart <= LOSS_APART else " **above 1e-3**")
        rows.append([PROGRAMS[name].title, f"{speed:.0f}", cpu, wall, met, curve, f"{found['losses'][-1]:.4f}"])
    titles = ["", "tokens/CPU-s", "ours is faster, CPU time", "wall time", "", "largest loss difference", "last loss"]
    second = []
    for name, found in facts.items():
        second.append(
            [
                PROGRAMS[name].title,
                f"{found['preparation_rows_per_second']:.0f}",
                f"{found['started'] + found['first_step']:.1f}",
                f"{found['peak_bytes'] / 2**20:.0f}",
                f"{found['saving_seconds']:.2f}",
                f"{found['model_bytes'] / 1e6:.1f}",
            ]
        )
    more = ["", "preparation, rows/CPU-s", "start to first step, s", "peak RSS, MiB", "saving, s", "model, MB"]
    return f"### {title}\n\n{table(titles, rows)}\n\n{table(more, second)}"


def version_in(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version('{package}'), m.version('transformers'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = [name for name in PROGRAMS if name != "ours"]
    parser.add_argument(
        "--peers", type=lambda text: [name for name in text.split(",") if name], default=peers, help=",".join(peers)
    )
    parser.add_argument("--steps", type=int, default=20, help=f"a multiple of {TURNS}")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step in fp32")
    parser.add_argument("--bf16-batch", type=int, help="in bf16; fewer where that is slow")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["fp32", "bf16"])
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--environments", type=Path, default=HERE.parents[1] / "build" / "peers")
    parser.add_argument("--write", action="store_true", help="write results.md")
    options = parser.parse_args()
    options.environments.mkdir(parents=True, exist_ok=True)
    wanted = dict.fromkeys(PROGRAMS[name].peer for name in options.peers)
    pythons = {peer: environment(peer, options.environments) for peer in wanted}
    versions = [f"apollo-sft {version('apollo-sft')}"]
    versions += [f"{peer} and its transformers {version_in(python, peer)}" for peer, python in pythons.items()]
    sizes = {"fp32": (options.batch, options.steps)}
    sizes["bf16"] = (options.bf16_batch or bf16_rows(options.batch), options.steps)
    parts = [", ".join(versions) + "."]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder / "model", options.hidden, options.layers)
        write_conversations(folder / "model", max(batch * steps for batch, steps in sizes.values()))
        for dtype in options.dtypes:
            batch, steps = sizes[dtype]
            settings = {
                "dtype": dtype,
                "batch": batch,
                "steps": steps,
                "every": steps // TURNS,
                "rate": RATE,
            }
            settings |= {"rows": batch * steps, "data": write_rows(folder, batch, steps)}
            facts = take_turns(["ours", *options.peers], folder, settings, options.environments)
            parts.append(report(f"{dtype}, {steps} steps of {batch} rows", dtype, facts, num_tokens(folder, dtype)))
            print(parts[-1], flush=True)
    if options.write:
        write_section("peers", "\n\n".join([__doc__ or "", NOTES.strip(), about_bf16(), *parts]))


if __name__ == "__main__":
    main()
