"""Broken command lines: whatever is typed, the answer is a config or one ConfigError, never a traceback."""

import json
import random

import pytest
import yaml

from apollo_sft.config.checks import check_paths
from apollo_sft.config.compose import YAML_PATH, compose
from apollo_sft.config.overrides import leaves
from apollo_sft.errors import ConfigError

NUM_LINES = 300
DEFAULTS = dict(leaves(yaml.safe_load(YAML_PATH.read_text(encoding="utf-8")), ""))
VALUES = [
    "1", "-1", "1e-4", "true", "null", "abc", "[a,b]", "['a','b']", "{a: 1}", "{a: {b: [1]}}", "[]", "{}", "''", '"',
    "~/x.parquet", "$HOME/x", "${HOME}", "${data.max_length}", "${oc.env:NO_SUCH}", "${", "a=b", "x(1)", "int(3)",
    "int(x)", "choice(1,2)", "range(1,3)", "glob(*)", "a,b", "???", "ü 数", "\\", "'", "{% if %}", "[[[", "\udce9",
    "@", "trainer", "nan", "1_000", "0x10", "${optim.lr}", "${.lr}", "${oc.decode:'['}", "${oc.create:[1]}", "a: b",
    "[null]", "8", "0.5", "false", "left", "fp32", "[console]",
]  # fmt: skip
FORMS = ["{key}={value}", "+{key}={value}", "++{key}={value}", "~{key}", "{key}", "--{key}={value}", "{key}@x={value}"]
EDITS = "=.,:[]{}()'\"\\$~+-@ #%\t\n0aü"


def mutate(text: str, chance: random.Random) -> str:
    """Delete, double or replace up to three characters."""
    for _ in range(chance.randint(0, 3)):
        at = chance.randrange(len(text) + 1)
        replacement = chance.choice(["", text[at : at + 1] * 2, chance.choice(EDITS)])
        text = text[:at] + replacement + text[at + 1 :]
    return text


def command_line(chance: random.Random) -> list[str]:
    sections = ["data", "model", "optim", "trainer", "data.multiturn", "model.fsdp_config"]
    if chance.random() < 0.3:
        key = chance.choice(list(DEFAULTS))
        return [mutate(f"{key}={json.dumps(DEFAULTS[key])}", chance)]
    keys = [*DEFAULTS, *sections, "data.micro_batch_size", "hydra.run.dir"]
    form = chance.choices(FORMS, weights=[18, 1, 1, 1, 1, 1, 1])[0]
    arguments = [form.format(key=chance.choice(keys), value=chance.choice(VALUES)) for _ in range(chance.randint(1, 2))]
    return [mutate(argument, chance) if chance.random() < 0.5 else argument for argument in arguments]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_but_a_config_or_a_config_error(seed: int, recwarn: pytest.WarningsRecorder) -> None:
    chance = random.Random(seed)
    num_accepted = 0
    for _ in range(NUM_LINES // 3):
        arguments = command_line(chance)
        try:
            composed = compose(arguments)
            num_accepted += 1
            check_paths(composed.config.data, composed.config.model, set(composed.overridden))
        except ConfigError:
            continue
        except Exception as error:
            raise AssertionError(f"{arguments!r} gave {type(error).__name__}: {error}") from error
    assert 5 < num_accepted < NUM_LINES // 4
    assert len(recwarn) == 0
