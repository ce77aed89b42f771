"""Whatever opens a base opens the export of its training: transformers 4.51.3, 4.57 and the pinned version.

Same ids and template text, the same logits, greedy answers that end alike, for bases in the forms of real families.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.support import base_templates as templates
from tests.support.base_tokenizers import BYTE_LEVEL
from tests.support.bases import FAMILIES, NEEDS_SENTENCEPIECE, WITHOUT_TEMPLATE
from tests.support.data import write_parquet
from tests.support.reader_table import Cell, Table, judge, red, show
from tests.support.readers import BARE, OLD, OLDEST, PINNED, READERS, ROOT, Answer, Asked, environment, read
from tests.support.runs import NUMBERS, TIMEOUT_SECONDS, arguments

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

TRAINING = ("trainer.total_training_steps=20", "trainer.total_epochs=4", "optim.lr=2e-2", "data.max_length=96")
NOT_OPENED = {("smollm3", "4.51.3"): "model", ("vicuna", "pinned-bare"): "tokenizer"}
"""What a reader cannot open of a base: that version knows no such model, or the package is not there."""


@dataclass(frozen=True)
class Case:
    """A training: of which family, with which template of ours, and the tokens that it adds."""

    family: str
    template: str | None = None
    added: tuple[str, ...] = ()


ALL_CASES = {name: Case(name, templates.PLAIN if name in WITHOUT_TEMPLATE else None) for name in FAMILIES} | {
    f"{name}, tokens added": Case(name, templates.CHATML, ("<|im_start|>", "<|im_end|>")) for name in ("gpt2", "pythia")
}
CASES = {
    name: case for name, case in ALL_CASES.items() if name in os.environ.get("APOLLO_READER_CASES", name).split(";")
}
"""All; or those that the variable names, with semicolons between them, for a shorter look."""


@dataclass(frozen=True)
class Read:
    """What each reader says: reader -> case -> answer."""

    bases: dict[str, dict[str, Answer]]
    exports: dict[str, dict[str, Answer]]

    def table(self) -> Table:
        """Judge every case by every reader."""
        return {name: {reader: self.cell(name, reader) for reader in self.bases} for name in CASES}

    def cell(self, name: str, reader: str) -> Cell:
        """Judge one; note where the versions do not agree on the base itself."""
        base, expected = self.bases[reader][name], self.bases[PINNED.name][name]
        found = judge(base, self.exports[reader][name], self.exports[PINNED.name][name], CASES[name].added)
        pairs = zip(base.said.get("ids", []), expected.said["ids"], strict=False)
        if other := sum(mine != theirs for mine, theirs in pairs):
            found.noted.append(f"the base itself: ids of {other} texts are not those by {PINNED.name}")
        return found


def folder_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def train(case: Case, folder: Path) -> Path:
    """Write the base, train it through the command line, and give the folder of the model."""
    base, out = folder / "model", folder / "out"
    base.mkdir(parents=True)
    FAMILIES[case.family](base)
    rng = np.random.default_rng(0)
    rows = [{"question": " ".join(rng.choice(NUMBERS, 3)), "answer": str(rng.choice(NUMBERS))} for _ in range(40)]
    write_parquet(folder / "train.parquet", rows)
    keys = [*TRAINING, "data.val_files=null"]
    if case.template is not None:
        (folder / "template.jinja").write_text(case.template, encoding="utf-8")
        keys.append(f"data.chat_template={folder / 'template.jinja'}")
    if case.added:
        keys.append("model.add_special_tokens=true")
    reader = PINNED if case.family in NEEDS_SENTENCEPIECE else BARE
    command = [sys.executable, "-m", "apollo_sft", *arguments(folder, out, *keys)]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(reader), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert ended.returncode == 0, f"{case.family}: {ended.stderr[-3000:]}"
    return out


def ask(folders: dict[str, Path], out: Path) -> Read:
    """Let every reader read all bases and exports; the pinned one says which prompts the others answer."""
    bases = {name: Asked(place / "model", CASES[name].template) for name, place in folders.items()}
    exports = {name: Asked(place / "out") for name, place in folders.items()}
    answered: dict[str, dict[str, Answer]] = {}
    for reader in READERS:
        keyed = {f"base-{folder_name(name)}": one for name, one in bases.items()}
        keyed |= {f"export-{folder_name(name)}": one for name, one in exports.items()}
        answered[reader.name] = read(reader, keyed, out / reader.name)
        if reader is PINNED:
            prompts = {name: answered[reader.name][f"export-{folder_name(name)}"].said["prompts"] for name in exports}
            exports = {name: Asked(one.folder, None, prompts[name]) for name, one in exports.items()}
    kinds = {
        kind: {one: {name: said[f"{kind}-{folder_name(name)}"] for name in folders} for one, said in answered.items()}
        for kind in ("base", "export")
    }
    return Read(kinds["base"], kinds["export"])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Read:
    root = tmp_path_factory.mktemp("families")
    folders = {name: root / folder_name(name) for name in CASES}
    for name, case in CASES.items():
        train(case, folders[name])
    return ask(folders, root / "read")


def test_whatever_opens_the_base_opens_the_export(everything: Read, capsys: pytest.CaptureFixture[str]) -> None:
    table = everything.table()
    with capsys.disabled():
        print(f"\n{show(table, [reader.name for reader in READERS])}")
    assert red(table) == []


def test_every_reader_opens_every_base_that_it_can_know(everything: Read) -> None:
    """A fixture that a reader cannot open would hide what is wrong with the export."""
    found = {
        (name, reader): part
        for reader, answers in everything.bases.items()
        for name, answer in answers.items()
        for part in ("tokenizer", "model")
        if answer.failure(part) is not None
    }
    assert found == {cell: part for cell, part in NOT_OPENED.items() if cell[0] in CASES}


def test_the_readers_are_what_they_are_called(everything: Read) -> None:
    said = {reader: next(iter(answers.values())).said for reader, answers in everything.bases.items()}
    versions = {reader: one["versions"]["transformers"] for reader, one in said.items()}
    assert versions[OLDEST.name] == "4.51.3"
    assert versions[OLD.name].startswith("4.57.")
    assert versions[PINNED.name] == versions[BARE.name] and versions[BARE.name].startswith("5.")


@pytest.mark.parametrize("name", CASES)
def test_the_training_was_one_that_can_tell(everything: Read, name: str) -> None:
    """The weights moved, and greedy answers of the export end by a stop: a wrong stop would show."""
    base, export = everything.bases[PINNED.name][name], everything.exports[PINNED.name][name]
    assert base.logits is not None and export.logits is not None
    rows = min(base.logits.shape[-1], export.logits.shape[-1])
    assert np.abs(base.logits[:, :rows] - export.logits[:, :rows]).max() > 0.1
    assert [one["stop"] for one in export.said["generated"]] != [None] * 2, export.said["generated"]


def change(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


SPOILT: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "a list of extra tokens": (
        "qwen3",
        "the tokenizer does not open",
        lambda folder: change(folder / "tokenizer_config.json", extra_special_tokens=["<think>"]),
    ),
    "a class of version 5": (
        "llama3",
        "the tokenizer does not open",
        lambda folder: change(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend"),
    ),
    "rotary parameters of version 5": (
        "qwen2.5",
        "logits differ",
        lambda folder: change(
            folder / "config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
        ),
    ),
    "another split": (
        "smollm2",
        "ids of",
        lambda folder: change(folder / "tokenizer.json", pre_tokenizer=BYTE_LEVEL),
    ),
    "another template": (
        "mistral",
        "is rendered as",
        lambda folder: change(folder / "tokenizer_config.json", chat_template=templates.CHATML),
    ),
    "a stop less": (
        "llama3",
        "stops of generation",
        lambda folder: change(folder / "generation_config.json", eos_token_id=410),
    ),
}
"""What is done to a copy of a base, and what the table has to say."""


def test_the_table_sees_what_is_spoilt(tmp_path: Path) -> None:
    asked: dict[str, Asked] = {}
    for name, (family, _, spoil) in SPOILT.items():
        for kind in ("base", "copy", "spoilt"):
            folder = tmp_path / folder_name(name) / kind
            folder.mkdir(parents=True)
            if kind == "base":
                FAMILIES[family](folder)
            else:
                shutil.copytree(folder.with_name("base"), folder, dirs_exist_ok=True)
        spoil(folder)
        asked |= {f"{kind}-{folder_name(name)}": Asked(folder.with_name(kind)) for kind in ("base", "copy", "spoilt")}
    answers = read(OLD, asked, tmp_path / "read")
    for name, (_, words, _) in SPOILT.items():
        base, copy, spoilt = (answers[f"{kind}-{folder_name(name)}"] for kind in ("base", "copy", "spoilt"))
        assert judge(base, copy, base) == Cell()
        assert any(words in line for line in judge(base, spoilt, base).red), name
