"""How much memory the host has to spare."""

from __future__ import annotations

from pathlib import Path

MEMORY_RATIO = 0.8
"""Share of the free CPU memory of a host that copies of a model, or of parts of it, may take."""


def available_memory() -> int:
    """Bytes of CPU memory that programs of this host may still take, as Linux estimates it.

    Source: MemAvailable in proc(5).
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kibibytes,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes) * 1024
