"""How the benches measure and write down: interleaved pairs, their spread, and a section of results.md for each."""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results.md"
RECORDED = Path(__file__).resolve().parent / "recorded.json"
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
PACKAGES = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of ratios, and the least and the most."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(ratios: Sequence[float]) -> Spread:
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


def over(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of pairs that were measured one after the other: ours divided by theirs, pair by pair."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()[2:]}


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself. Without, such products are many times slower than float32."""
    return any(flag in cpu_flags() for flag in BF16_FLAGS)


@cache
def bf16_slowdown() -> float:
    """CPU time of a product in bfloat16 over one in float32, one thread."""
    import torch

    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        one, other = torch.randn(864, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        times = []
        for _ in range(6):
            began = time.process_time()
            one @ other
            times.append(time.process_time() - began)
        seconds.append(statistics.median(times[1:]))
    torch.set_num_threads(threads)
    return seconds[0] / seconds[1]


def bf16_rows(rows: int) -> int:
    """Half as many, a quarter, … where a step in bfloat16 would take that much too long, one at least."""
    return max(1, rows >> max(0, round(math.log2(bf16_slowdown() / 2.5))))


def about_bf16() -> str:
    """A sentence for results; empty where there is nothing to say."""
    if has_bf16():
        return ""
    return (
        f"This processor has no bfloat16 instructions: such products take {bf16_slowdown():.0f} times as long as in "
        "float32. The bf16 figures here are of smaller batches and say little about processors that have them."
    )


def machine() -> str:
    """One line: processor, cores, what it knows of bfloat16, versions, the day."""
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    found = re.search(r"model name\s*:\s*(.+)", text)
    name = found.group(1) if found else platform.processor()
    flags = ", ".join(flag for flag in BF16_FLAGS if flag in cpu_flags()) or "none (neither avx512_bf16 nor amx_bf16)"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"{name}, {text.count('processor	:')} cores, bfloat16 instructions: {flags}. "
        f"Python {platform.python_version()}, {versions}. {datetime.date.today().isoformat()}."
    )


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in cells) + " |" for cells in lines)


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put `text` under the heading `name`, in the place of what an earlier run left there."""
    old = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    head, *parts = re.split(r"^## ", old, flags=re.M)
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}
    sections[name] = re.sub(r"\n{3,}", "\n\n", f"{machine()}\n\n{text.strip()}")
    body = "\n\n".join(f"## {title}\n\n{sections[title]}" for title in sorted(sections))
    path.write_text(f"{head.rstrip()}\n\n{body}\n", encoding="utf-8")


def write_ratios(name: str, ratios: Mapping[str, Sequence[float]], path: Path = RECORDED) -> None:
    """What the regression guard (`tests/commands/test_speed_guard.py`) compares: what each pair gave, under `name`."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    old[name] = {key: [round(value, 4) for value in values] for key, values in ratios.items()}
    path.write_text(json.dumps(dict(sorted(old.items())), indent=1) + "\n", encoding="utf-8")


def verdict(value: float, wanted: float, at_least: bool) -> str:
    met = value >= wanted if at_least else value <= wanted
    return "reached" if met else f"**not reached** ({'≥' if at_least else '≤'} {wanted})"
