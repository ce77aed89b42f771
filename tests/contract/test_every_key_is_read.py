"""Every key of sft_trainer.yaml is read by the program, or concerns the config alone.

Found in the source text: `config.data.max_length`, `data.max_length` where `data` is annotated or assigned as that
section, `multiturn.enable` after `multiturn = data.multiturn`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from apollo_sft.config.compose import known_keys
from apollo_sft.config.schema import SftConfig

PACKAGE = Path(__file__).resolve().parents[2] / "apollo_sft"
CONFIG_ONLY = {
    "use_remove_padding": "changes nothing, and says so",
}


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """(class name, dotted path) of every section."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            dotted = f"{path}{name}"
            yield info.annotation.__name__, dotted
            yield from sections(info.annotation, f"{dotted}.")


SECTION_OF = {"SftConfig": "", **dict(sections(SftConfig))}
CONFIG_NAMES = {name.rpartition(".")[2] for name in SECTION_OF.values() if name}


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`a.b.c` of an attribute, its first name replaced by what it stands for; '' for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def named_sections(tree: ast.AST) -> dict[str, str]:
    """Local names that stand for a section: `data: DataConfig`, `fsdp = config.fsdp_config`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and isinstance(node.annotation, ast.Name):
            target = node.arg if isinstance(node, ast.arg) else getattr(node.target, "id", "")
            if SECTION_OF.get(node.annotation.id):
                names[target] = SECTION_OF[node.annotation.id]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        pairs = [(node.targets[0], node.value)]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        for target, value in pairs:
            path = dotted(value, names)
            if isinstance(target, ast.Name) and path.rpartition(".")[2] in CONFIG_NAMES:
                names[target.id] = path
    return names


def keys_read(source: str) -> set[str]:
    """Known keys that the source reads. A key is found by its last section and its own name."""
    tree = ast.parse(source)
    chains = {dotted(node, {}) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = named_sections(function)
        chains |= {dotted(node, names) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    endings = {".".join(chain.split(".")[-2:]) for chain in chains} | {chain.rpartition(".")[2] for chain in chains}
    return {key for key in known_keys() if ".".join(key.split(".")[-2:]) in endings}


def test_every_key_is_read() -> None:
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if "config" not in path.relative_to(PACKAGE).parts:
            read |= keys_read(path.read_text(encoding="utf-8"))
    unread = [key for key in known_keys() if key not in read | set(CONFIG_ONLY)]
    assert unread == [], "nothing reads these keys, so setting them would be ignored"
    assert not read & set(CONFIG_ONLY), "these keys are read now: take them off the list"


def test_the_search_tells_a_key_that_is_read_from_one_that_is_not() -> None:
    source = """
def f(config: SftConfig, mine: OptimConfig, other: Thing) -> None:
    fsdp, turns = config.model.fsdp_config, config.data.multiturn
    print(config.trainer.seed, mine.lr, fsdp.dtype, turns.enable, config.use_remove_padding, other.max_length)

def g(fsdp: Thing) -> None:
    print(fsdp.fsdp_size)
"""
    expected = {
        "trainer.seed",
        "optim.lr",
        "model.fsdp_config.dtype",
        "data.multiturn.enable",
        "use_remove_padding",
    }
    assert keys_read(source) == expected
