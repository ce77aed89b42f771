"""`apollo-sft verify`: does every layout of this run give the same gradient? Shown as a table, on CPU processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from rich.console import Console
from rich.text import Text

from apollo_sft.cli.job import compose_job
from apollo_sft.errors import ConfigError
from apollo_sft.tools.verify.layouts import BOUNDS, ORACLE_FILE, STEPS, Figures, Layout, fits, worlds

RANKS = 4
ORACLE = -1
TITLE = -2
"""Rows of the table that are no layouts."""
HELP = """apollo-sft verify [--ranks N] [--real-weights] key=value …

Takes the keys of a training and shows that its gradient does not depend on how the work is laid out: two steps of your
own rows on a small copy of your model, in float64, under every layout that N processes on this machine can form. Each
is compared with an oracle: plain transformers, one document at a time. Nothing is trained or left behind.

  --ranks N        most processes [4, or what your own layout needs]
  --real-weights   the model itself instead of a small copy (48 bytes a parameter)
  --help           this text

Exit codes: 0 all layouts agree, 1 one does not, 2 refused."""
NUMBERS = {"loss": 10, "grad norm": 11, "deviation": 10}
"""Columns of the table and their widths."""


@dataclass(slots=True)
class Table:
    """The table on the screen, and the results so far."""

    console: Console
    folder: Path
    layouts: list[Layout]
    seen: set[int] = field(default_factory=set)
    exact: int = 0
    worst: float = 0.0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    """The layouts that do not agree, with the reason."""

    def name(self, index: int) -> str:
        """Return the name of a row."""
        if index == ORACLE:
            return "oracle"
        if index == TITLE:
            return "layout"
        return self.layouts[index].name

    def label(self, index: int) -> str:
        """Return the name with the number of processes, for lines outside of the table."""
        if index == ORACLE:
            return self.name(index)
        return f"{_processes(self.layouts[index])}, {self.name(index)}"

    def row(self, index: int, cells: list[str], verdict: tuple[str, str]) -> None:
        """Print a row. `verdict`: its text and style."""
        width = 2 + max(len(layout.name) for layout in self.layouts)
        padded = [f"{cell:>{size}}" for cell, size in zip(cells, NUMBERS.values(), strict=True)]
        style = {TITLE: "bold", ORACLE: "dim"}.get(index, "")
        line = Text.assemble(f"  {self.name(index):<{width}}", *padded, "  ", verdict, style=style)
        line.rstrip()
        self.console.print(line)

    def show(self, figures: Figures) -> None:
        """Print the row of one layout with its verdict, and keep the result."""
        index = figures.index
        label = self.label(index)
        self.seen.add(index)
        if figures.error:
            self.reasons.append((label, figures.error.strip()))
            self.row(index, ["-", "-", "-"], ("FAILED", "bold red"))
            return

        numbers = [f"{figures.loss:.6f}", f"{figures.grad_norm:.6f}"]
        if index == ORACLE:
            self.row(index, [*numbers, ""], ("", ""))
            return

        verdict = ("exact", "green")
        if figures.wrong:
            verdict = ("WRONG", "bold red")
            self.reasons.append((label, f"differs by {figures.wrong}"))
        else:
            self.exact += 1
            self.worst = max(self.worst, figures.deviation)

        self.row(index, [*numbers, f"{figures.deviation:.1e}"], verdict)


def main(arguments: list[str]) -> int:
    """Verify the layouts of a training. Return the exit code: 0 every layout agrees with the oracle, 1 one does not.

    Raises: ApolloError for what a training would refuse as well.
    """
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    ranks, real_weights, overrides = _parse(arguments)
    composed = compose_job(overrides)
    if composed is None:
        return 0

    config = composed.config
    ranks = _num_ranks(config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size, ranks)

    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="apollo-verify-") as name, _term_interrupts():
        folder = Path(name)
        with console.status("reading your rows, making the model"):
            from apollo_sft.tools.verify.setup import set_up  # torch, after everything that can be refused without it

            rehearsal = set_up(config, ranks, real_weights, folder)
        _print_description(console, rehearsal.description)
        table = Table(console, folder, rehearsal.job.layouts)
        table.row(TITLE, list(NUMBERS), ("verdict", ""))
        # The process that runs alone writes the oracle: without that file there is nothing to compare with.
        for processes in sorted({layout.processes for layout in table.layouts}):
            if processes == 1 or (folder / ORACLE_FILE).exists():
                _run(table, processes)

    return _conclude(table, time.monotonic() - began)


def _parse(arguments: list[str]) -> tuple[int | None, bool, list[str]]:
    """Return our own options, which may be anywhere in the line, and the rest of it. Raises: ConfigError."""
    rest: list[str] = []
    value: str | None = None
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--ranks":
            value = next(waiting, "")
        elif argument.startswith("--ranks="):
            value = argument.partition("=")[2]
        elif argument != "--real-weights":
            rest.append(argument)

    if value is not None and not (value.isdecimal() and 1 <= int(value) <= 64):
        raise ConfigError("--ranks takes a number of processes", found=repr(value), expected="1 to 64")

    ranks = None
    if value is not None:
        ranks = int(value)
    return ranks, "--real-weights" in arguments, rest


def _num_ranks(sp_size: int, fsdp_size: int, given: int | None) -> int:
    """Return a number of processes that the user's own layout fits into.

    Raises: ConfigError when the `given` number is too small.
    """
    # Both must divide the number of processes.
    needed = math.lcm(sp_size, max(1, fsdp_size))
    ranks = given or max(RANKS, needed)
    if not any(fits(sp_size, fsdp_size, processes) for processes in worlds(ranks)):
        raise ConfigError(
            "--ranks is too small for your own layout",
            found=f"{ranks} processes, ulysses_sequence_parallel_size={sp_size}, "
            f"model.fsdp_config.fsdp_size={fsdp_size}",
            expected=f"a multiple of {needed}",
        )

    return ranks


@contextmanager
def _term_interrupts() -> Iterator[None]:
    """Let SIGTERM end the processes as Ctrl-C does, which removes the folder too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_description(console: Console, description: list[tuple[str, str]]) -> None:
    rows = [
        *description,
        ("oracle", "plain transformers, eager attention, one document at a time, all logits"),
        ("deviation", f"largest relative difference in loss, gradients, and weights after {STEPS} steps"),
    ]
    for name, meaning in rows:
        console.print(Text.assemble((f"{name:<11}", "bold"), meaning))

    console.print()


def _run(table: Table, processes: int) -> None:
    """Start the processes once, and show each of their layouts when it is done."""
    awaited = [i for i, layout in enumerate(table.layouts) if layout.processes == processes]
    table.console.print(Text(_processes(table.layouts[awaited[0]]), style="bold cyan"))
    if processes == 1:
        awaited.insert(0, ORACLE)

    results = table.folder / "results.jsonl"
    output = table.folder / f"output-{processes}.txt"
    results.write_text("", encoding="utf-8")
    with output.open("wb") as stream, table.console.status("") as status, _worker(table.folder, processes, stream) as w:
        ended = False
        shown = 0
        while not ended:
            ended = w.poll() is not None  # before the results are read: its last lines are not missed
            lines = results.read_text(encoding="utf-8").split("\n")[:-1]
            for line in lines[shown:]:
                table.show(Figures(**json.loads(line)))
            shown = len(lines)
            status.update(next((table.name(i) for i in awaited if i not in table.seen), "done"))
            time.sleep(0.1)

    missing = [index for index in awaited if index not in table.seen]
    if missing and not (table.folder / f"failed-{processes}").exists():
        last_lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
        table.show(Figures(missing.pop(0), error="\n".join(last_lines) or "its process ended without a message"))

    for index in missing:
        table.row(index, ["-", "-", "-"], ("not run", "yellow"))


@contextmanager
def _worker(folder: Path, processes: int, stream: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """Start the processes, and end them with this block."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]

    command += ["apollo_sft.tools.verify.worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, env=environment, stdout=stream, stderr=stream) as worker:
        try:
            yield worker
        finally:
            worker.terminate()


def _processes(layout: Layout) -> str:
    if layout.processes == 1:
        return "1 process"
    return f"{layout.processes} processes"


def _conclude(table: Table, seconds: float) -> int:
    """Print the result, and return the exit code."""
    total = len(table.layouts)
    table.console.print()
    if table.exact == total:
        first, later = (f"{bound:.0e}".replace("e-0", "e-") for bound in BOUNDS)
        table.console.print(
            f"All {total} layouts give the gradient of the oracle; the largest deviation is {table.worst:.1e}.\n"
            f"Rounding may reach {first} in the first step and {later} after it. ({seconds:.0f} s)",
            style="green",
        )
        return 0

    for label, reason in table.reasons:
        table.console.print(Text.assemble((label, "bold"), "\n", textwrap.indent(reason, "  ")))

    end = f"{total - table.exact} of {total} layouts do not give the gradient of the oracle, or could not run."
    table.console.print(f"\n{end} ({seconds:.0f} s)", style="bold red")
    return 1
