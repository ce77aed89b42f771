"""Change JSON files of others in their own form: order of keys, indentation and escapes stay as they were."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.publish import read_json


def change_json(path: Path, wanted: Mapping[str, Any]) -> None:
    """Make a JSON file hold `wanted`. One that does already keeps its bytes; a new one is indented by two."""
    if not path.is_file():
        path.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    if read_json(path) != wanted:
        path.write_text(like(path.read_text(encoding="utf-8"), wanted), encoding="utf-8")


def like(text: str, wanted: Mapping[str, Any]) -> str:
    """Return `wanted` as JSON in the form of `text`."""
    indent = re.match(r"\s*\{\s*?\n([ \t]*)\S", text)
    compact = indent is None and '": ' not in text and '", ' not in text
    written = json.dumps(
        wanted,
        indent=indent[1] if indent else None,
        separators=(",", ":") if compact else None,
        ensure_ascii=text.isascii() and "\\u" in text,
    )
    return f"{written}\n" if text.endswith("\n") else written
