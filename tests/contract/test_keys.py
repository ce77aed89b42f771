"""Every key does what it says of itself: a changed value is refused or passed by a run that goes on, makes another
store or the same, and may or may not differ between hosts. And a key that says nothing cannot be added.
"""

import copy
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import create_model

from apollo_sft.checkpoint.run_folder.resume import check_same
from apollo_sft.config.checks import check_combinations
from apollo_sft.config.compose import compose, recorded
from apollo_sft.config.keys import LAYOUT, MODEL, NOTHING, NUMERICS, ORDER, TOKENS, Key, Section
from apollo_sft.config.overrides import parse
from apollo_sft.config.reference import example
from apollo_sft.config.schema import KEYS, SftConfig
from apollo_sft.config.sources import paths_of
from apollo_sft.config.values import value_of, with_values
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.data.store.fingerprint import store_key
from apollo_sft.errors import ConfigError
from apollo_sft.parallel.consensus import _differences
from apollo_sft.parallel.launch import World
from apollo_sft.train.base_model import load_tokenizer
from apollo_sft.train.start_checks import start_of
from tests.support.data import tiny_tokenizer

UNKNOWN_MARK = "{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
"""A chat template with a control token that the tokenizer does not know."""
GIVEN = ["data.train_files=train.jsonl", "data.val_files=held_out.jsonl", "model.partial_pretrain=base"]
MUST_STAY = TOKENS | ORDER | MODEL | NUMERICS
"""What a run that goes on may not change."""


@cache
def given() -> SftConfig:
    return compose(GIVEN).config


def values_in(overrides: str) -> dict[str, object]:
    return {setting.key: setting.content for setting in map(parse, shlex.split(overrides))}


def pair(key: str) -> tuple[SftConfig, SftConfig]:
    """Two configurations that differ in one key: before, and with its example."""
    changed = with_values(given(), values_in(example(key)))
    before = with_values(changed, {key: value_of(given(), key)})
    assert before != changed
    return before, changed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the examples name and that a store is made of."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("train.jsonl", "a.parquet", "b.parquet", "my_data.py"):
        (folder / name).write_text(f"# {name}\n")
    tiny_tokenizer(UNKNOWN_MARK).save_pretrained(folder / "base")
    other = tiny_tokenizer(UNKNOWN_MARK)
    other.add_tokens(["<extra>"])
    other.save_pretrained(folder / "Qwen" / "Qwen2.5-0.5B-Instruct")
    return folder


@cache
def tokenizer_in(folder: Path) -> object:
    return load_tokenizer(folder, trust_remote_code=False)


def store_of(config: SftConfig, place: Path) -> str:
    """The key of the store of the training data, made as a run makes it."""
    tokenizer = copy.deepcopy(tokenizer_in(place / config.model.partial_pretrain))
    template = fit_template(tokenizer, config.data, config.model.add_special_tokens)
    files = paths_of(config.data.train_files)
    return store_key(files, config.data.train_max_samples, tokenizer, template, config.data, place / "hashes")


@pytest.mark.parametrize("key", KEYS)
def test_a_run_goes_on_after_a_change_that_leaves_samples_and_model_alone(key: str) -> None:
    before, changed = map(recorded, pair(key))
    notes: list[str] = []
    if KEYS[key].changes & MUST_STAY and not KEYS[key].by_content:
        with pytest.raises(ConfigError, match=f"found: +{key}"):
            check_same(before, changed, "the folder", False, notes)
    else:
        check_same(before, changed, "the folder", False, notes)
        assert notes[0].startswith(f"changed since then: {key}: ")


@pytest.mark.parametrize("key", KEYS)
def test_another_store_is_made_after_a_change_of_tokens(key: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before, changed = pair(key)
    assert (store_of(before, place) != store_of(changed, place)) == (TOKENS in KEYS[key].changes)


@pytest.mark.parametrize("key", KEYS)
def test_hosts_agree_on_all_but_where_things_lie(key: str) -> None:
    first, second = map(start_of, pair(key))
    world = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    found = _differences(json.loads(json.dumps(first, default=str)), second, world)
    if KEYS[key].per_host:
        assert found is None
    else:
        assert found is not None
        assert f" has {key}" in found


def test_what_is_compared_by_its_content_makes_another_store() -> None:
    """So a run that passes over the value still meets what has changed."""
    assert all(TOKENS in key.changes for key in KEYS.values() if key.by_content)


@pytest.mark.parametrize("key", [name for name, key in KEYS.items() if key.unused is not None])
def test_a_key_without_effect_is_said_to_have_none(key: str) -> None:
    unused = KEYS[key].unused
    assert unused is not None
    _, with_remedy = pair(key)
    alone = with_values(given(), {key: value_of(with_remedy, key)})
    for config, is_said in ((alone, unused.remedy is not None), (with_remedy, False)):
        notes: list[str] = []
        check_combinations(config, {key}, notes)
        assert (f"{key} has no effect {unused.when}" in notes) == is_said


def test_a_key_that_does_not_say_what_it_changes_cannot_be_added() -> None:
    with pytest.raises(TypeError) as caught:

        class TrainerConfig(Section):
            note: str = ""

    first, todo, changes = str(caught.value).splitlines()
    assert first == "the key TrainerConfig.note does not declare what a change of its value changes"
    assert 'write note: Annotated[…, Key(changes=…, example="…")] = …' in todo
    assert "one of NOTHING, TOKENS, ORDER, MODEL, NUMERICS, LAYOUT, LENGTH, or several" in changes
    with pytest.raises(TypeError, match=r"Late\.note has no default"):

        class Late(Section):
            note: Annotated[str, Key(changes=NOTHING)]


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (Key(changes=LAYOUT), "does not declare with which value apollo-sft verify starts"),
        (Key(changes=NOTHING, neutral=1), "has neutral=…, which is for keys that change the layout"),
        (Key(changes=MODEL, stored_as="template"), "has stored_as=…, which is for keys that change tokens"),
    ],
)
def test_facts_of_a_key_that_do_not_go_together(key: Key, part: str) -> None:
    with pytest.raises(TypeError, match=f"the key Late.note .*{part}"):
        create_model("Late", __base__=Section, note=(Annotated[int, key], 1))
