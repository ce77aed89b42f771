"""Other versions of transformers, each in a folder beside the environment, and what they read of model folders."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from tests.support.base_templates import CONVERSATIONS, TEXTS

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "readers"
SCRIPT = Path(__file__).with_name("reader_script.py")
STAMP = ".installed"
INSTALL_SECONDS = 1200
READ_SECONDS = 1200
NEW_TOKENS = 24


@dataclass(frozen=True)
class Reader:
    """A version of transformers and what shadows the environment's packages for it; torch is the environment's."""

    name: str
    requirements: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return PLACE / self.name


PINNED = Reader("pinned", ("sentencepiece==0.2.*",))
BARE = Reader("pinned-bare")
"""The environment as it is: nothing reads a SentencePiece model there."""

OLD = Reader("4.57", ("transformers==4.57.*", "tokenizers==0.22.*", "huggingface_hub==0.36.*", "sentencepiece==0.2.*"))
OLDEST = Reader(
    "4.51.3", ("transformers==4.51.3", "tokenizers==0.21.*", "huggingface_hub==0.36.*", "sentencepiece==0.2.*")
)
READERS = (PINNED, BARE, OLD, OLDEST)


@dataclass(frozen=True)
class Asked:
    """A folder to read. `template` stands in for one that the folder lacks; `prompts` are ids to answer."""

    folder: Path
    template: str | None = None
    prompts: list[list[int]] | None = None


@dataclass(frozen=True)
class Answer:
    """What a reader says of a folder: see reader_script.py."""

    said: dict[str, Any]
    logits: np.ndarray | None

    def failure(self, part: str) -> str | None:
        """Name what kept `part` (tokenizer or model) from being opened."""
        value = self.said.get(part)
        return error_of(value) if value is not None else f"nothing is said of the {part}"


def error_of(value: Any) -> str | None:
    """Give the exception that stands in place of an answer."""
    return str(value["error"]) if isinstance(value, dict) and "error" in value else None


def install(reader: Reader) -> Path:
    """Install what a reader needs into its folder, once; a stamp says of what and for which Python."""
    wanted = json.dumps([sys.version_info[:2], *reader.requirements])
    PLACE.mkdir(parents=True, exist_ok=True)
    with FileLock(PLACE / f"{reader.name}.lock"):
        stamp = reader.folder / STAMP
        if stamp.is_file() and stamp.read_text() == wanted:
            return reader.folder
        shutil.rmtree(reader.folder, ignore_errors=True)
        reader.folder.mkdir()
        if reader.requirements:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(reader.folder)]
            subprocess.run([*pip, *reader.requirements], check=True, timeout=INSTALL_SECONDS)
        stamp.write_text(wanted)
    return reader.folder


def environment(reader: Reader) -> dict[str, str]:
    """Give the variables of a process that finds a reader's packages before all others."""
    more = {"PYTHONPATH": str(install(reader)), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | more | {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def read(reader: Reader, asked: Mapping[str, Asked], out: Path, texts: Sequence[str] = TEXTS) -> dict[str, Answer]:
    """Read all folders in one process of this reader; `out` is a new folder for what it writes."""
    out.mkdir(parents=True)
    folders = {
        name: {"folder": str(one.folder), "template": one.template, "prompts": one.prompts}
        for name, one in asked.items()
    }
    job = {"out": str(out), "texts": texts, "conversations": CONVERSATIONS, "new_tokens": NEW_TOKENS}
    path = out / "job"
    path.write_text(json.dumps(job | {"folders": folders}), encoding="utf-8")
    command = [sys.executable, "-P", str(SCRIPT), str(path)]
    ended = subprocess.run(
        command, cwd=out, env=environment(reader), capture_output=True, text=True, timeout=READ_SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return {name: _answer(out, name) for name in asked}


def _answer(out: Path, name: str) -> Answer:
    said = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    logits = out / f"{name}.npy"
    return Answer(said, np.load(logits) if logits.is_file() else None)
