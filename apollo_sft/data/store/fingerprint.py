"""Compute the key of a store from its inputs: stores of equal keys hold equal samples."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from apollo_sft.config.keys import TOKENS, Section, keys_in
from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.files import is_remote, shown
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.errors import DataError

FORMAT = 5
"""Raised whenever the same inputs give other samples or another layout of the files."""

SETTLED_SECONDS = 2.0
"""A younger file may still change within one tick of the clock that stamps files, so its hash is not kept."""


def store_key(
    files: Sequence[str], max_rows: int, tokenizer: Any, template: ChatTemplate, data: DataConfig, hashes: Path
) -> str:
    """Return the key, 32 hexadecimal digits. `hashes` is a folder where hashes of unchanged files are kept."""
    parts: dict[str, Any] = {
        "format": FORMAT,
        "versions": [transformers.__version__, tokenizers.__version__],
        "files": [[shown(file), content_hash(file, hashes)] for file in files],
        "max_rows": max_rows,
        "tokenizer": tokenizer_hash(tokenizer),
        "template": [template.text, template.tool_text],
        "data": _values_of(data),
        "multiturn": list(_values_of(data.multiturn).values()),
    }
    # The source of the class, because it may give other rows after a change.
    if data.custom_cls.path is not None:
        parts["custom_cls"] = [file_hash(Path(data.custom_cls.path), hashes), data.custom_cls.name]
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _values_of(section: Section) -> dict[str, Any]:
    """Return the keys of a section that change tokens, and that no other part of the store's key covers."""
    values = {}
    for name, key in keys_in(type(section)).items():
        if TOKENS in key.changes and key.stored_as is None:
            values[name] = getattr(section, name)
    return values


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash the whole backend, added tokens included, and what templates and encoding read of the tokenizer."""
    around = {
        "special": tokenizer.special_tokens_map,
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps(around, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def content_hash(file: str, hashes: Path) -> str:
    """Hash a local or a remote file. Raises: DataError for a file that cannot be read."""
    if not is_remote(file):
        return file_hash(Path(file), hashes)
    from apollo_sft.data.read.remote import remote_hash

    return remote_hash(file)


def file_hash(path: Path, hashes: Path) -> str:
    """Return the SHA-256 of the whole file. It is read once, and recognised later by stamps that every write changes.

    Raises: DataError for a file that cannot be read.
    """
    path = path.resolve()
    if not path.is_file():
        raise DataError(f"{path}: no such file")

    stat = path.stat()
    stamp = f"{path}|{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    known = hashes / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    if known.is_file():
        digest = known.read_text(encoding="ascii")
        if len(digest) == 64:  # a killed process may have written a part of it
            return digest

    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read", found=error.strerror) from error

    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
        hashes.mkdir(parents=True, exist_ok=True)
        known.write_text(digest, encoding="ascii")
    return digest


def _plain(value: Any) -> Any:
    """Turn sequences and mappings of the config into lists and dicts, whatever type they have there."""
    if hasattr(value, "keys"):
        return dict(value)
    return list(value)
