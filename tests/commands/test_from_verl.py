"""docs/from_verl.md against the schema and the table of spellings: no key is missing there, and none is stale."""

import re
from pathlib import Path

from apollo_sft.cli.workflow import PREPARES, TRAINERS
from apollo_sft.config.aliases import REFUSED, REFUSED_SECTIONS, RENAMED, WITHOUT_EFFECT
from apollo_sft.config.compose import known_keys

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "from_verl.md").read_text(encoding="utf-8")


def table(header: str) -> dict[str, str]:
    """First cell -> second cell of the table whose first line is `header`."""
    _, found, after = TEXT.partition(f"{header}\n")
    assert found, header
    rows = after.partition("\n\n")[0].splitlines()[1:]
    cells = [row.strip("| ").split(" | ") for row in rows]
    first = [key for key, _ in cells]
    assert len(first) == len(set(first)), "a key stands there twice"
    return dict(cells)


def listed(start: str) -> list[str]:
    """What stands in backticks in the paragraph that begins so."""
    _, found, after = TEXT.partition(f"\n{start}")
    assert found, start
    return re.findall(r"`([\w.]+)`", after.partition("\n\n")[0])


KEYS = table("| key | here |")


def test_every_key_of_ours_stands_there_once() -> None:
    shared, own = [key.strip("`") for key in KEYS], listed("Only here: ")
    there, ours = {*shared, *own}, {*known_keys()}
    assert not there ^ ours, f"not in docs/from_verl.md: {ours - there}; no key: {there - ours}"
    assert len(there) == len(shared) + len(own), "a key stands in both"


def test_every_other_spelling_stands_there_as_it_is_read() -> None:
    given = {key.strip("`"): re.findall(r"`([\w.]+)`", read)[0] for key, read in table("| given | read as |").items()}
    assert given == RENAMED
    assert sorted(listed("Accepted, ")) == sorted(WITHOUT_EFFECT)
    assert sorted(listed("Refused, ")) == sorted([*REFUSED, *REFUSED_SECTIONS])


def test_no_key_waits_to_be_built() -> None:
    assert "not built" not in TEXT


def test_every_module_of_a_workflow_stands_there() -> None:
    modules = table("| module in the file | runs |")
    trainers, *_ = modules
    assert set(re.findall(r"`([\w.]+)`", trainers)) == {*TRAINERS} - {"apollo_sft"}
    commands = {f"`{module}`": f"`apollo-sft prepare {name}`" for module, name in PREPARES.items()}
    assert {module: runs for module, runs in modules.items() if module != trainers} == commands
