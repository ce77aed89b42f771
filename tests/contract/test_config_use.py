"""A function takes the sections of the configuration that it reads, or plain values: few need all of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "apollo_sft"
WHOLE = "SftConfig"
MAX_FUNCTIONS = 30


def names_in(annotation: ast.expr) -> Iterator[str]:
    """Yield the names that an annotation uses, also those inside of text."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from names_in(ast.parse(node.value, mode="eval").body)


def takers(source: str) -> list[str]:
    """Return the names of the functions and methods with a parameter that is the whole configuration."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        annotations = [parameter.annotation for parameter in parameters if parameter is not None]
        if any(WHOLE in names_in(annotation) for annotation in annotations if annotation is not None):
            found.append(node.name)
    return found


def test_few_functions_take_the_whole_configuration() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in takers(path.read_text(encoding="utf-8"))
    ]
    assert "train/run.py: train" in found
    assert len(found) <= MAX_FUNCTIONS, "\n".join(found)


def test_the_count_sees_every_form_of_parameter() -> None:
    source = """
class Section:
    config: SftConfig  # a field is no parameter

    def method(self, config: SftConfig) -> None: ...

def plain(config: SftConfig): ...
def optional(config: SftConfig | None = None): ...
def inside(configs: list[SftConfig]): ...
def named(config: schema.SftConfig): ...
def quoted(config: "SftConfig"): ...
def keyword(*, config: SftConfig): ...
def many(*configs: SftConfig): ...
async def later(config: SftConfig, /): ...
def outer():
    def inner(**configs: SftConfig): ...

def result() -> SftConfig: ...
def section(data: DataConfig): ...
def bare(config): ...
"""
    expected = "inner inside keyword later many method named optional plain quoted"
    assert sorted(takers(source)) == expected.split()
