"""The ledger of sizes: what a plain run really loads, and what each feature adds when a key asks for it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.sizes import num_code_lines

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "apollo_sft"
LEDGER: dict[str, Any] = tomllib.loads((Path(__file__).parent / "ledger.toml").read_text(encoding="utf-8"))
FEATURES: dict[str, list[str]] = LEDGER["features"]
PLAIN_RUN = """
import json, sys
from pathlib import Path
from apollo_sft.__main__ import main

out, *arguments = sys.argv[1:]
code = main(arguments)
loaded = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "apollo_sft"]
Path(out).write_text(json.dumps({"code": code, "loaded": [file for file in loaded if file]}))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Our own files that a plain run of four steps has loaded when it ends, by their paths in the package."""
    from tests.support.runs import arguments, write_inputs

    folder = tmp_path_factory.mktemp("plain")
    inputs = write_inputs(folder / "inputs")
    words = arguments(inputs, folder / "out", "trainer.total_training_steps=4", "trainer.save_freq=2")
    found = folder / "found.json"
    # A process of its own: others have loaded more for their own sake.
    command = [sys.executable, "-c", PLAIN_RUN, str(found), *words]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.exists(), finished.stderr

    run = json.loads(found.read_text())
    assert run["code"] == 0, finished.stderr
    files = {str(Path(file).relative_to(PACKAGE)) for file in run["loaded"]}
    return {file for file in files if not file.endswith("__init__.py")}


def lines_of(files: set[str]) -> int:
    return sum(num_code_lines((PACKAGE / file).read_text(encoding="utf-8")) for file in files)


def test_a_plain_run_loads_a_small_program(loaded: set[str]) -> None:
    assert "train/loop.py" in loaded
    assert (len(loaded), lines_of(loaded)) <= (LEDGER["plain"]["files"], 10**9), sorted(loaded)
    assert lines_of(loaded) <= LEDGER["plain"]["lines"]


def test_a_plain_run_loads_no_feature_and_no_program_about_a_training(loaded: set[str]) -> None:
    features = {file for files in FEATURES.values() for file in files}
    beside = {file for file in loaded if file.startswith(tuple(LEDGER["beside"]["folders"])) and file != "cli/job.py"}
    assert loaded & features == set()
    assert loaded & {*LEDGER["beside"]["files"]} | beside == set()


def test_every_file_is_of_a_plain_run_a_feature_or_beside_the_training(loaded: set[str]) -> None:
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    features = [file for files in FEATURES.values() for file in files]
    beside = {file for file in files if file.startswith(tuple(LEDGER["beside"]["folders"]))}
    known = loaded | {*features, *LEDGER["beside"]["files"]} | beside
    assert sorted(files - known) == [], "name the feature that it belongs to in ledger.toml"
    assert sorted(known - files) == [], "is no longer there"
    assert len(features) == len(set(features)), "a file belongs to one feature"


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_not_larger_than_the_ledger_says(feature: str) -> None:
    assert lines_of({*FEATURES[feature]}) <= LEDGER["feature_lines"][feature]
