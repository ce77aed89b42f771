"""Tokenizers and templates that were broken at random: a store is built, or one clear error says what is wrong."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.config.compose import compose
from apollo_sft.data.render import limits
from apollo_sft.errors import ApolloError
from apollo_sft.train.prepare_run import prepare
from tests.support.reliability import record
from tests.support.runs import arguments, write_inputs

SLOWEST_SECONDS = 20
"""CPU time."""
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    359,
    360,
    2**31,
    2**63,
    10**30,
    1.5,
    "",
    "a",
    "\ud800",
    "é",
    [],
    ["a"],
    {},
    {"a": 1},
]
TEMPLATES = [
    "", "{{", "{% for %}", "{{ messages }}", "{{ eos_token }}", "{{ bos_token }}{{ messages[0].content }}", "text",
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[9].content }}", "{{ undefined.x }}",
    "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10000000000 }}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content|upper }}<|im_end|>{% endfor %}",
    "{{ messages[0].content }}<|im_end|>{% if add_generation_prompt %}<|im_start|>assistant{% endif %}", "\x00",
    "\ufeff{{",
]  # fmt: skip


@pytest.fixture(autouse=True)
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.4)
    monkeypatch.setattr(limits, "TICK_SECONDS", 0.4)
    monkeypatch.setattr(limits, "MAX_MEMORY_BYTES", 1 << 29)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON tree; the vocabulary is left whole but for its ends."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        keys = keys if len(keys) < 40 else keys[:4] + keys[-4:]
        found += [(value, key) for key in keys]
        waiting += [value[key] for key in keys]
    return found


def change_json(text: str, chance: random.Random) -> str:
    tree = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        container, key = chance.choice(places(tree) or [(tree, "a")])
        if chance.random() < 0.4 and isinstance(container, dict):
            container.pop(key, None)
        elif isinstance(container, list) and key >= len(container):
            container.append(chance.choice(VALUES))
        else:
            container[key] = chance.choice(VALUES)
    return json.dumps(tree)


def change_bytes(text: str, chance: random.Random) -> str:
    at = chance.randrange(max(len(text), 1))
    return chance.choice(
        [text[:at], text[:at] + chance.choice("{}[]\"',:\\0€") + text[at + 1 :], text[at:], text * 2, "[" * 100_000]
    )


def deep(text: str, chance: random.Random) -> str:
    return json.dumps(json.loads(text) | {"normalizer": None, "x": None}).replace(
        '"x": null', '"x": ' + "[" * 200 + "]" * 200
    )


def special_tokens(text: str, chance: random.Random) -> str:
    """No end token, an end token that is the padding, tokens that nobody knows."""
    tree = json.loads(text)
    for name in chance.sample(["eos_token", "pad_token", "bos_token", "unk_token"], 2):
        tree[name] = chance.choice([None, "<|endoftext|>", "<|im_end|>", "<|nobody|>", "", {"content": "<|x|>"}, 5])
    return json.dumps(tree)


def far_ids(text: str, chance: random.Random) -> str:
    """Ids beyond the embedding, twice, or below 0."""
    tree = json.loads(text)
    for token in chance.sample(tree["added_tokens"], 2):
        token["id"] = chance.choice([360, 361, 10**6, 2**32 - 1, 2**32, -1, 0, 1])
    return json.dumps(tree)


CHANGES: dict[str, list[Callable[[str, random.Random], str]]] = {
    "tokenizer.json": [change_json, change_bytes, far_ids, deep],
    "tokenizer_config.json": [change_json, change_bytes, special_tokens, special_tokens],
    "chat_template.jinja": [change_bytes, lambda text, chance: chance.choice(TEMPLATES)],
}


def broken(originals: dict[str, str], chance: random.Random) -> dict[str, str]:
    """The files, one or two of them changed."""
    changed = dict(originals)
    for file in chance.sample(FILES, chance.choice([1, 1, 2])):
        changed[file] = chance.choice(CHANGES[file])(originals[file], chance)
    return changed


def try_all(inputs: Path, seeds: range) -> None:
    originals = {file: (inputs / "model" / file).read_text() for file in FILES}
    config = compose(arguments(inputs, inputs / "out", "data.val_files=null")).config
    failures, slowest, num_refused = [], 0.0, 0
    try:
        for seed in seeds:
            for file, text in broken(originals, random.Random(seed)).items():
                (inputs / "model" / file).write_bytes(text.encode("utf-8", "surrogatepass"))
            begun = time.process_time()
            try:
                prepare(config)
            except ApolloError as error:
                num_refused += 1
                if error.exit_code != 2 or not str(error).strip():
                    failures.append(f"seed {seed}: {error!r}")
            except BaseException as error:  # a panic of the tokenizers' Rust is no Exception
                failures.append(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}")
            slowest = max(slowest, time.process_time() - begun)
    finally:
        for file, text in originals.items():
            (inputs / "model" / file).write_text(text)
    record("fuzzed tokenizers and templates", trials=len(seeds), failures=len(failures), worst_seconds=slowest)
    assert failures == []
    assert slowest < SLOWEST_SECONDS
    assert num_refused >= len(seeds) // 4


def test_a_store_or_one_clear_error(inputs: Path) -> None:
    try_all(inputs, range(60))
    try_all(inputs, range(1136, 1140))  # 1138: a template without end, met by every row
    try_all(inputs, range(1258, 1259))  # an unk_token that is no token


@pytest.mark.long
def test_a_store_or_one_clear_error_at_length(inputs: Path) -> None:
    try_all(inputs, range(1000, 3000))
