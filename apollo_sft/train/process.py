"""Set up a process before anything is read: the user's module, determinism, seeds."""

from __future__ import annotations

import importlib
import os
import random

import numpy as np
import torch

from apollo_sft.errors import ConfigError


def load_external_lib(name: str | None) -> None:
    """Import the user's module first of all, so that it can register tokenizers, configs and models."""
    if name is None:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "model.external_lib cannot be imported",
            found=f"{name}: {error}",
            expected="the name of a module on PYTHONPATH",
        ) from error


def make_deterministic() -> None:
    """Make torch refuse operations that would not give the same bits each time. To be called before CUDA is used.

    Source: docs.pytorch.org/docs/stable/notes/randomness.html.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int, rank: int) -> None:
    """Seed the generators of this process. Ranks draw different dropout masks.

    The order of the data and initial weights do not depend on these generators.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed + rank)
