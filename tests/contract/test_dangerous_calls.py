"""Nothing in the program opens a pickle, evaluates text or starts a shell; ruff says the same in `make check`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "os.system", "os.popen", "pandas.read_pickle", "pd.read_pickle", "torch.hub.load",
}  # fmt: skip
FORBIDDEN_VALUES = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("use_safetensors", False)}
IMPORTED_BY_NAME = {
    "apollo_sft/train/process.py": "model.external_lib, which is the user's own",
    "apollo_sft/cli/main.py": "the commands, from a table",
    "apollo_sft/data/read/rows.py": "the readers of kinds of files, from a table",
    "apollo_sft/report/sinks.py": "the loggers, from a table",
    "apollo_sft/train/strategy.py": "FSDP2 and FSDP1, from a table",
}
"""Where importlib.import_module is used, and of what."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in FORBIDDEN_CALLS or called.endswith("import_module"):
            yield called
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in FORBIDDEN_VALUES:
                yield f"{called}({keyword.arg}={keyword.value.value})"


@pytest.mark.parametrize("folder", ["apollo_sft", "bench"])
def test_the_program_does_none_of_it(folder: str) -> None:
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        accepted = {"importlib.import_module"} if name in IMPORTED_BY_NAME else set()
        if problems := set(dangers(path.read_text(encoding="utf-8"))) - accepted:
            found[name] = problems
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "importlib.import_module(text)",
    ],
)
def test_the_search_finds_each(line: str) -> None:
    imports = "import pickle\n" if "pickle." in line else ""
    assert list(dangers(imports + line))


@pytest.mark.parametrize(
    "line",
    ["pickle.load(f)", "eval(t)", "exec(t)", "yaml.load(t)", "subprocess.run(t, shell=True)", "torch.load(t)"],
)
def test_make_check_refuses_each(line: str, tmp_path: Path) -> None:
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    module = line.partition(".")[0] if "." in line.partition("(")[0] else "os"
    path = tmp_path / "new.py"
    path.write_text(f"import {module}\n\nf = t = {module}.x\nprint({line})\n")
    command = [str(ruff), "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(path)]
    selected = subprocess.run(command, capture_output=True, text=True, check=False)
    assert selected.returncode == 1
    assert any(rule in selected.stdout for rule in ("S102", "S301", "S307", "S506", "S602", "TID251")), selected.stdout
