"""The built wheel works in another environment, far from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "apollo-demo"
)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.long
def test_the_wheel_runs_far_from_the_checkout(tmp_path: Path) -> None:
    source, home = tmp_path / "source", tmp_path / "elsewhere"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    home.mkdir()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", home, cwd=source)
    (wheel,) = home.glob("apollo_sft-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"apollo_sft/config/sft_trainer.yaml", "apollo_sft/py.typed"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"apollo_sft"}

    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=home)
    python = home / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home)
    shutil.rmtree(source)
    packages = {"PYTHONPATH": sysconfig.get_path("purelib")}
    where = run(python, "-c", "import apollo_sft.errors as e; print(e.__file__)", cwd=home, **packages)
    assert Path(where.strip()).is_relative_to(home / "venv"), "the installed package, not the checkout's"
    assert "train_batch_size: 256" in run(python, "-m", "apollo_sft", "--help", cwd=home, **packages)
    demo = run(home / "venv" / "bin" / "apollo-sft", "demo", cwd=home, **packages)
    assert "exact match after: " in demo
    assert "apollo-sft 0." in run(home / "venv" / "bin" / "apollo-sft", "--version", cwd=home, **packages)
