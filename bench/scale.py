"""How a step grows with tokens of a batch, length of documents, ranks and rows of the dataset: straight lines, or not.

    python bench/scale.py [--pairs N] [--what tokens,lengths,ranks,rows] [--write]

CPU time per token (all ranks, one thread each), and bytes that a step holds, counted tensor by tensor. Forwards hold at
most 1024 tokens, so a larger batch has more of them. Rows: what planning and loading cost a step, without a model.
--write draws bench/scale.svg, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import table, write_section
from workload import write_model, write_store

from apollo_sft.report.curves import Scale, number, ticks, value_scale
from apollo_sft.report.document import Plot

VOCABULARY, HIDDEN, LAYERS = 2048, 192, 2
FORWARD_TOKENS = 1024
BATCH_TOKENS, DOCUMENT_TOKENS = 512, 128
FACTORS = {"tokens": [1, 2, 4, 8, 16], "lengths": [1, 2, 4, 8], "ranks": [1, 2, 4], "rows": [10**4, 10**5, 10**6]}
LABELS = {
    "tokens": "tokens of a batch",
    "lengths": "tokens of a document",
    "ranks": "ranks",
    "rows": "rows of the dataset",
}
NOTES = """
Straight where it should be: time per token does not grow with the tokens of a batch, nor does memory once a forward is
full. Where documents are longer, attention has more to do for each token. All ranks share the cores: what a second one
adds is gathering and reducing through gloo, which weighs in a model of a million parameters (`bench/layouts.py` takes a
larger one); four cost no more than two. Loading takes a fiftieth of the time of training even this small a model.
"""
DRAWING = Path(__file__).resolve().parent / "scale.svg"
WIDTH, HEIGHT, MARGIN = 380, 200, 56


def points(what: str) -> list[dict[str, int]]:
    """Where it is measured: `length` of each document, `rows` of a batch, `ranks`, by the number that is shown."""
    found = []
    for factor in FACTORS[what]:
        point = {"x": factor, "length": DOCUMENT_TOKENS, "rows": BATCH_TOKENS // DOCUMENT_TOKENS, "ranks": 1}
        if what == "tokens":
            point |= {"x": BATCH_TOKENS * factor, "rows": point["rows"] * factor}
        elif what == "lengths":
            length = DOCUMENT_TOKENS * factor
            point |= {"x": length, "length": length, "rows": 4 * BATCH_TOKENS // length}
        elif what == "ranks":
            point |= {"ranks": factor, "rows": 8 * BATCH_TOKENS // DOCUMENT_TOKENS}
        found.append(point)
    return found


def measure(folder: Path, out: Path, pairs: int, every: Sequence[dict[str, int]]) -> None:
    """One point after the other, `pairs` rounds; CPU seconds of all ranks for a token, and counted bytes of rank 0."""
    import torch
    import torch.distributed as dist
    from memory import counted

    from apollo_sft.config.compose import compose
    from apollo_sft.data.batch.loader import Loader
    from apollo_sft.data.store.store_files import SampleStore
    from apollo_sft.model import load
    from apollo_sft.parallel import launch
    from apollo_sft.parallel.mesh import build_mesh
    from apollo_sft.train.assemble import assemble
    from apollo_sft.train.loaders import plan_spec
    from apollo_sft.train.step import train_step

    torch.set_num_threads(1)
    world = launch.start("cpu", needs_group=False)
    mesh = build_mesh(world, 1, -1)
    hf_config = load.read_config(folder / "model", False)
    keys = [f"model.partial_pretrain={folder / 'model'}", "data.train_files=none", "data.val_files=null"]
    model, optimizer = assemble(compose(keys).config, folder / "model", hf_config, world, mesh)
    batches = []
    for point in every:
        more = [f"data.train_batch_size={point['rows']}", "data.micro_batch_size_per_gpu=1"]
        more += ["data.use_dynamic_bsz=true", f"data.max_token_len_per_gpu={FORWARD_TOKENS}"]
        config = compose([*keys, *more]).config
        spec = plan_spec(config.data, config.trainer.seed, mesh, hf_config)
        batches.append(Loader(SampleStore(folder / f"store-{point['length']}"), spec, mesh.dp_rank).batch(0))
    seconds: list[list[float]] = [[] for _ in every]
    for _ in range(pairs + 1):
        for number_of, batch in enumerate(batches):
            began = time.process_time()
            train_step(model, optimizer, batch, world, 1.0)
            took = torch.tensor(time.process_time() - began, dtype=torch.float64)
            if world.size > 1:
                dist.all_reduce(took)
            seconds[number_of].append(float(took) / batch.num_tokens)
    for point, batch, taken in zip(every, batches, seconds, strict=True):
        optimizer.zero_grad(set_to_none=True)
        with counted(model.causal_lm.base_model, VOCABULARY) as memory:
            train_step(model, optimizer, batch, world, 1.0)
        if world.is_main:
            figures = {"x": point["x"], "seconds": taken[1:], "bytes": memory.all.most}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
    del model, optimizer, mesh
    launch.stop()
    sys.stdout.flush()
    os._exit(0)  # what holds a group of gloo at exit aborts the process


def measure_rows(folder: Path, num_rows: int, pairs: int) -> dict[str, Any]:
    """CPU seconds of a step's loading for a token, at steps that lie far apart; memory that this process alone has."""
    from plan import private_bytes

    from apollo_sft.data.batch.loader import Loader
    from apollo_sft.data.batch.plan import PlanSpec
    from apollo_sft.data.store.store_files import SampleStore

    before = private_bytes()
    loader = Loader(SampleStore(folder / f"rows-{num_rows}"), PlanSpec(256, 8, 1, 1), 0)
    loader.batch(0)
    seconds = []
    for round_number in range(pairs):
        tokens, began = 0, time.process_time()
        for step in range(10):
            tokens += loader.batch((7 * step + 3 * round_number) % (num_rows // 256)).num_tokens
        seconds.append((time.process_time() - began) / tokens)
    return {"x": num_rows, "seconds": seconds, "bytes": private_bytes() - before}


def run(what: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    if what == "rows":
        sizes = [size for size in FACTORS["rows"] if size <= options.most_rows]
        for size in sizes:
            write_store(folder / f"rows-{size}", size, (4, 12), VOCABULARY)
        return [measure_rows(folder, size, options.pairs) for size in sizes]
    every = points(what)
    if what == "ranks":
        return [part for point in every for part in started([point], folder, options)]
    return started(every, folder, options)


def started(every: list[dict[str, int]], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measured by as many processes as the points have ranks."""
    out = folder / "figures.jsonl"
    out.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={every[0]['ranks']}"]
    command = [sys.executable, *launcher, __file__, "--pairs", str(options.pairs)]
    command += ["--worker", str(folder), str(out), json.dumps(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.stderr)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def rows_of(what: str, found: list[dict[str, Any]]) -> str:
    first = statistics.median(found[0]["seconds"])
    rows = []
    for figures in found:
        middle = statistics.median(figures["seconds"])
        low, high = (limit(figures["seconds"]) / first for limit in (min, max))
        cells = [f"{figures['x']:,}", f"{middle * 1e6:.2f}", f"{middle / first:.2f} ({low:.2f} to {high:.2f})"]
        rows.append([*cells, f"{figures['bytes'] / 2**20:.1f}"])
    return table([LABELS[what], "CPU µs per token", "over the first", "MiB"], rows)


def panel(title: str, curve: Sequence[tuple[float, float]], left: int, top: int) -> str:
    """A line with its points; across logarithmic in 2, up from zero."""
    places = [math.log2(x) for x, _ in curve]
    across = Scale(min(places), max(*places, min(places) + 1))
    up = value_scale(Plot(title, (), from_zero=True), [value for _, value in curve])
    at = [(MARGIN + WIDTH * across.share(math.log2(x)), HEIGHT * (1 - up.share(y)) + 30) for x, y in curve]
    parts = [f'<text x="{MARGIN}" y="14">{title}</text>']
    for tick in ticks(up, 4):
        y = HEIGHT * (1 - up.share(tick)) + 30
        parts.append(f'<line x1="{MARGIN}" x2="{MARGIN + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#26c" stroke-width="2"/>')
    for (x, y), (value, _) in zip(at, curve, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#26c"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT + 46}" text-anchor="middle">{number(value)}</text>')
    return f'<g transform="translate({left} {top})">{"".join(parts)}</g>'


def drawing(every: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    for row, (what, found) in enumerate(every.items()):
        times = [(figures["x"], statistics.median(figures["seconds"]) * 1e6) for figures in found]
        sizes = [(figures["x"], figures["bytes"] / 2**20) for figures in found]
        top = row * (HEIGHT + 70)
        parts.append(panel(f"CPU µs per token, by {LABELS[what]}", times, 0, top))
        parts.append(panel(f"MiB, by {LABELS[what]}", sizes, WIDTH + 2 * MARGIN, top))
    size = f"{2 * WIDTH + 4 * MARGIN} {len(every) * (HEIGHT + 70)}"
    style = 'font-family="sans-serif" font-size="12" fill="#444"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" {style}>{background}{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--what", type=lambda text: text.split(","), default=list(FACTORS))
    parser.add_argument("--most-rows", type=int, default=10**6)
    parser.add_argument("--write", action="store_true", help="write results.md and scale.svg")
    parser.add_argument("--drawing", type=Path, help="write the drawing there")
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "OUT", "POINTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, out, every = options.worker
        measure(Path(folder), Path(out), options.pairs, json.loads(every))
    found, parts = {}, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder / "model", HIDDEN, LAYERS, VOCABULARY)
        for length in (DOCUMENT_TOKENS * factor for factor in FACTORS["lengths"]):
            write_store(folder / f"store-{length}", 64, (length, length), VOCABULARY)
        for what in options.what:
            found[what] = run(what, folder, options)
            parts.append(rows_of(what, found[what]))
            print(f"{parts[-1]}\n", flush=True)
    if options.write or options.drawing:
        (options.drawing or DRAWING).write_text(drawing(found), encoding="utf-8")
    if options.write:
        write_section("scale", "\n\n".join([__doc__ or "", NOTES.strip(), "![the figures drawn](scale.svg)", *parts]))


if __name__ == "__main__":
    main()
