"""Liger's kernels: refused where they cannot run; and, interpreted on the CPU, the gradients of every family."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.errors import ConfigError
from apollo_sft.model import liger
from tests.support.liger import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["liger-kernel==0.8.5", "triton==3.9.0"]
TOLERANCE = 5e-6
"""float32, sums in another order."""


def model_config(*keys: str):
    return compose(["data.val_files=null", "data.train_files=x.parquet", "model.use_liger=true", *keys]).config.model


def test_refused_on_cpu() -> None:
    with pytest.raises(ConfigError, match=r"model\.use_liger=true: .* CUDA only(?s:.)*model\.use_liger=false"):
        liger.check(model_config(), torch.device("cpu"))


def test_refused_in_float64() -> None:
    keys = ("model.fsdp_config.model_dtype=fp64", "model.fsdp_config.dtype=fp64")
    with pytest.raises(ConfigError, match="compute in float32"):
        liger.check(model_config(*keys), torch.device("cuda"))


def test_refused_with_compile() -> None:
    with pytest.raises(ConfigError, match=r"model\.use_liger=true and model\.compile=true"):
        liger.check(model_config("model.compile=true"), torch.device("cuda"))


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="the kernels are installed")
def test_refused_without_the_kernels() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'apollo-sft\[liger\]'"):
        liger.check(model_config(), torch.device("cuda"))


def test_refused_for_an_unproven_architecture() -> None:
    with pytest.raises(ConfigError, match=r"not proven for this architecture(?s:.)*model_type bloom"):
        liger.check_family(model_config(), "bloom")
    liger.check_family(model_config(), "qwen2")


def test_every_family_is_compared() -> None:
    assert set(FAMILIES) == set(liger.FAMILIES)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_kernels_equal_transformers(tmp_path: Path) -> None:
    """Installed for this test alone, and run by Triton's interpreter: a norm, a gate or a rope that differs shows."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *KERNELS]
    subprocess.run(command, check=True, timeout=600)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "tests.parity.liger_worker"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["family"] for line in lines] == list(FAMILIES)
    for line in lines:
        kernels = liger.FAMILIES[line["family"]]
        assert line["gradient"] < TOLERANCE, line
        assert line["loss"][1] == pytest.approx(line["loss"][0], rel=1e-6), line
        assert line["same"], line
        assert any("Norm" in name for name in line["patched"]), line
        assert any("MLP" in name for name in line["patched"]) == ("swiglu" in kernels), line
        assert line["rope"] == ("rope" in kernels), line
