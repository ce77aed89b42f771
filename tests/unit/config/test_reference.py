"""docs/configuration.md against the program: it is what the schema and the aliases say today."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from apollo_sft.config.aliases import REFUSED, REFUSED_SECTIONS, RENAMED, WITHOUT_EFFECT
from apollo_sft.config.checks import LOGGERS
from apollo_sft.config.compose import YAML_PATH, compose, known_keys, validate
from apollo_sft.config.reference import (
    BEGIN,
    END,
    example,
    generated,
    kind,
    main,
    renewed,
)
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"
SAYS_THAT_IT_DOES_NOTHING = {"use_remove_padding"}


@cache
def default_config() -> SftConfig:
    return compose([]).config


def test_the_page_is_what_the_program_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page, "run make docs-reference"


def test_every_key_stands_there_once_in_the_order_of_the_yaml() -> None:
    headings = re.findall(r"^#### `([\w.]+)`$", generated(), re.M)
    assert [key for key in headings if key in known_keys()] == [*known_keys()]


@pytest.mark.parametrize("key", [*known_keys()])
def test_every_example_composes_and_changes_the_key(key: str) -> None:
    composed = compose(shlex.split(example(key)))
    changed, default = composed.config, default_config()
    for part in key.split("."):
        changed, default = getattr(changed, part), getattr(default, part)
    assert changed != default
    assert bool(composed.notes) == (key in SAYS_THAT_IT_DOES_NOTHING or "model_dtype=bf16" in example(key))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data.train_batch_size", "whole number ≥ 1"),
        ("data.truncation", "`error` or `left` or `right` or `drop`"),
        ("data.train_max_samples", "-1, or 1 and more"),
        ("data.val_files", "a path, or a list of paths, or of {path, name}; or `null`"),
        ("data.max_token_len_per_gpu", "whole number ≥ 1, or `null`"),
        ("model.lora_dropout", "number ≥ 0 and < 1"),
        ("optim.betas", "list of 2: number ≥ 0 and < 1"),
        ("trainer.seed", "whole number ≥ 0 and < 2^63"),
        ("trainer.logger", "any of " + ", ".join(f"`{name}`" for name in LOGGERS)),
        ("use_remove_padding", "true or false"),
    ],
)
def test_type_and_range(key: str, expected: str) -> None:
    assert kind(key) == expected


@pytest.mark.parametrize("key", known_keys())
def test_a_range_is_the_one_that_is_checked(key: str) -> None:
    """One below a whole number's least value is refused, and that value is not."""
    least = re.fullmatch(r"whole number ≥ (-?\d+)(?:, or `null`| and < 2\^63)?", kind(key))
    if least is None:
        return
    assert validate(tree(key, int(least[1])))
    with pytest.raises(ConfigError, match=re.escape(key)):
        validate(tree(key, int(least[1]) - 1))


def tree(key: str, value: object) -> dict[str, object]:
    """The default configuration with one value changed."""
    raw = default_config().model_dump(mode="json")
    *sections, name = key.split(".")
    inner = raw
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return raw


def test_every_spelling_stands_there() -> None:
    rows = dict(re.findall(r"^\| `([\w.*]+)` \| (.+) \|$", generated(), re.M))
    sections = {f"{name}.*" for name in REFUSED_SECTIONS}
    assert {*rows} == {*RENAMED, *WITHOUT_EFFECT, *REFUSED} | sections
    assert all(rows[given] == f"`{ours}`" for given, ours in RENAMED.items())


def test_a_change_anywhere_makes_the_page_stale_and_what_is_written_by_hand_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"by hand\n{BEGIN}\nstale\n{END}\nby hand too\n")
    in_yaml = tmp_path / "keys.yaml"
    main([str(page), str(in_yaml)])
    assert in_yaml.read_text(encoding="utf-8") == YAML_PATH.read_text(encoding="utf-8")
    text = page.read_text()
    assert text.startswith("by hand\n")
    assert text.endswith("by hand too\n")
    assert "stale" not in text
    assert "#### `optim.lr`\n\n*number > 0 · default `1e-5`*\n\nPeak learning rate" in text
    with pytest.raises(ConfigError, match="no place"):
        renewed("a page without marks")
