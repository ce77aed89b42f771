"""What the three programs of `bench/peers.py` share: they take turns and say what each cost. Standard library only."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Turns:
    """Every `every` steps the process says so and waits until it is its turn again; waiting costs no CPU time.

    A turn: CPU seconds and wall seconds. `facts`: what is told at the end.
    """

    def __init__(self, every: int) -> None:
        self.every, self.steps = every, 0
        self.turns: list[tuple[float, float]] = []
        self.facts: dict[str, Any] = {"losses": []}

    def begin(self) -> None:
        """When everything is ready for the first step."""
        self.facts["ready"] = time.time()
        self._wait()

    def step(self, loss: float | None = None) -> None:
        if loss is not None:
            self.facts["losses"].append(loss)
        self.steps += 1
        if self.steps == 1:
            self.facts["first_step"] = time.perf_counter() - self.wall
        if self.steps % self.every == 0:
            self.turns.append((time.process_time() - self.cpu, time.perf_counter() - self.wall))
            self._wait()

    def _wait(self) -> None:
        print("TURN", file=sys.__stdout__, flush=True)
        sys.stdin.readline()
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def end(self, model: Path, saving_seconds: float) -> None:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        self.facts |= {
            "turns": self.turns,
            "peak_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024,
            "saving_seconds": saving_seconds,
            "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        }
        print("FACTS " + json.dumps(self.facts), file=sys.__stdout__, flush=True)
