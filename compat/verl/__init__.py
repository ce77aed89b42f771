"""With this folder's parent on PYTHONPATH `-m verl.trainer.fsdp_sft_trainer` means `-m apollo_sft`. No other part of
verl is here: asking for one is refused in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALIASES = ("verl.trainer", "verl.trainer.fsdp_sft_trainer")
FOLDER = Path(__path__[0]).parent


def refusal(name: str) -> ModuleNotFoundError:
    what = f"{name} is not here: {FOLDER} holds verl.trainer.fsdp_sft_trainer alone, as another name of apollo_sft"
    return ModuleNotFoundError(f"{what}; take that folder off PYTHONPATH to reach verl itself", name=name)


def nothing_else(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__`, for `from verl import DataProto`. It raises: ModuleNotFoundError."""

    def refuse(name: str) -> Any:
        if name.startswith("_") or f"{module}.{name}" in ALIASES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise refusal(f"{module}.{name}")

    return refuse


class LastResort:
    """Where Python looks for a module that it has found nowhere else."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        del path, target
        if name.startswith("verl.") and name not in ALIASES:
            raise refusal(name)


__getattr__ = nothing_else(__name__)
sys.meta_path.append(LastResort)
