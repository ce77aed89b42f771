"""What a newcomer does first: clone, `make demo`. In an environment of its own, with what pip finds."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_make_demo_from_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "apollo-sft"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    made = subprocess.run(
        ["make", "demo"],
        cwd=clone,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    found = re.search(r"^exact match after: ([\d.]+) %$", made.stdout, re.M)
    assert found is not None
    assert float(found[1]) >= 90
    assert (clone / "apollo-demo" / "trained-model" / "model.safetensors").is_file()
    again = subprocess.run(["make", "env"], cwd=clone, env=environment, capture_output=True, text=True, check=True)
    assert "pip" not in again.stdout, "the second time there is nothing to do"
