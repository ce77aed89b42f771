"""Layers, the independence of their parts and "config imports no torch" hold; the checker finds a breach."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = Path(sys.executable).parent / "lint-imports"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [str(LINT), "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "apollo_sft", tmp_path / "apollo_sft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.skipif(not LINT.exists(), reason="import-linter is not installed")
@pytest.mark.parametrize(
    ("file", "line"),
    [
        (None, ""),
        ("config/aliases.py", "import torch"),
        ("data/batch/loader.py", "from apollo_sft.model import head"),
        ("checkpoint/run_folder/folder.py", "from apollo_sft.train import loop"),
        ("train/optim/build.py", "from apollo_sft.cli import main"),
        ("errors.py", "from apollo_sft.config import schema"),
    ],
)
def test_layers(file: str | None, line: str, copy: Path) -> None:
    if file is not None:
        path = copy / "apollo_sft" / file
        path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    finished = lint(copy)
    assert (finished.returncode == 0) == (file is None), finished.stdout + finished.stderr
    assert ("0 broken" in finished.stdout) == (file is None)


def test_the_config_loads_no_torch() -> None:
    source = "import sys, apollo_sft.__main__, apollo_sft.cli.main, apollo_sft.cli.train; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert "apollo_sft.config.schema" in loaded
    assert not {"torch", "transformers", "pyarrow"} & set(loaded)
