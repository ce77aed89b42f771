"""`apollo-sft store`: the tokenised data that trainings keep, and their removal."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apollo_sft.cli.arguments import Parser
from apollo_sft.errors import ApolloError, ConfigError

if TYPE_CHECKING:
    from apollo_sft.tools.store_list import Entry

HELP = """apollo-sft store list [options]
apollo-sft store prune KEY … | --older-than AGE | --unfinished | --all [options]

Trainings keep tokenised data (data.store_dir) and find them again. `list` shows every store: its files, rows, samples,
tokens and size, when it was made and used last; and what builds that were killed have left. `prune` removes some. What
a process builds or has open is never removed. A store that is gone is made again when a training needs it.

  KEY               of a store, or the first 6 or more characters of it
  --older-than AGE  what was not used for so long: 30d, 12h, 2w
  --unfinished      what killed or refused builds left, and damaged stores
  --all             every store, and remembered hashes of files
  --dry-run         say what would be removed, and remove nothing
  --dir DIR         the folder of stores [data.store_dir's default]
  --json            as one JSON object
  --help            this text

Exit codes: 0 done, 1 a file cannot be read or removed, 2 refused."""
SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SHORTEST_KEY = 6
SHOWN_KEY = 12


def main(arguments: list[str]) -> int:
    """Returns the exit code. Raises: ApolloError."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    options = _parse(arguments)
    from apollo_sft.data.store.open import store_root
    from apollo_sft.tools.store_list import entries

    root = store_root(options.dir)
    try:
        found = entries(root)
        if options.what == "list":
            print(json.dumps(_figures(root, found), indent=2) if options.json else "\n".join(_table(root, found)))
            return 0
        return _prune(root, found, options)
    except OSError as error:
        raise ApolloError(f"{root}: {error.strerror}", found=error.filename) from error


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Raises: ConfigError."""
    parser = Parser(prog="apollo-sft store", add_help=False, allow_abbrev=False)
    parser.add_argument("what", choices=["list", "prune"])
    parser.add_argument("keys", nargs="*", metavar="KEY")
    parser.add_argument("--older-than", type=_age)
    parser.add_argument("--dir")
    for flag in ("--unfinished", "--all", "--dry-run", "--json"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_intermixed_args(arguments)
    selects = options.keys or options.older_than is not None or options.unfinished or options.all
    if options.what == "list" and (selects or options.dry_run):
        raise ConfigError("apollo-sft store list shows all stores", fix="apollo-sft store prune removes some")
    if options.what == "prune" and not selects:
        raise ConfigError(
            "apollo-sft store prune: nothing says what to remove",
            expected="keys, --older-than AGE, --unfinished or --all",
            fix="apollo-sft store list shows what there is",
        )
    return options


def _age(text: str) -> float:
    """Seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"a number with m, h, d or w, such as 30d, not {text!r}")
    return float(found[1]) * SECONDS[found[2]]


def _prune(root: Path, found: list[Entry], options: argparse.Namespace) -> int:
    from apollo_sft.tools.store_list import hashes, remove

    chosen = _chosen(found, options)
    gone: list[Entry] = []
    kept: list[Entry] = []
    for entry in chosen:
        is_gone = not entry.in_use if options.dry_run else remove(entry)
        (gone if is_gone else kept).append(entry)
    if options.all and not options.dry_run:
        for path in hashes(root):
            path.unlink(missing_ok=True)
    if options.json:
        names = {"removed": gone, "kept": kept}
        print(
            json.dumps({"dry_run": options.dry_run} | {n: _figures(root, some) for n, some in names.items()}, indent=2)
        )
        return 0
    for entry in gone:
        print(f"{'would remove' if options.dry_run else 'removed'} {_name(entry)}, {size(entry.num_bytes)}")
    for entry in kept:
        print(f"kept {_name(entry)}: a process {'builds it' if entry.state == 'being built' else 'uses it'}")
    freed = size(sum(entry.num_bytes for entry in gone))
    print(f"{freed} {'would be' if options.dry_run else 'are'} free of {len(found)} entries in {root}")
    return 0


def _chosen(found: list[Entry], options: argparse.Namespace) -> list[Entry]:
    """Raises: ConfigError for a key that is none, or not the only one."""
    keys = set()
    for text in options.keys:
        matching = {entry.key for entry in found if len(text) >= SHORTEST_KEY and entry.key.startswith(text)}
        if len(matching) != 1:
            raise ConfigError(
                f"{text} names no store" if not matching else f"{text} names several stores",
                found=", ".join(sorted(matching)) or None,
                expected=f"a key that apollo-sft store list shows, or its first {SHORTEST_KEY} or more characters",
            )
        keys |= matching
    now = time.time()
    return [
        entry
        for entry in found
        if options.all
        or entry.key in keys
        or (options.unfinished and entry.state != "whole")
        or (options.older_than is not None and now - entry.used > options.older_than)
    ]


def _name(entry: Entry) -> str:
    files = (
        f" ({entry.files[0]}{f' and {len(entry.files) - 1} more' if entry.files[1:] else ''})" if entry.files else ""
    )
    return f"{entry.key[:SHOWN_KEY]}{files}" if entry.state == "whole" else f"{entry.path.name}, {entry.state}"


def _table(root: Path, found: list[Entry]) -> list[str]:
    header = ["key", "rows", "samples", "tokens", "size", "made", "used", "files"]
    rows = [header, *(_cells(entry) for entry in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for key, *cells in rows:
        middle = [cell.rjust(width) for cell, width in zip(cells[:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([key.ljust(widths[0]), *middle, cells[-1]]).rstrip())
    total = f"{len(found)} entries, {size(sum(entry.num_bytes for entry in found))} in {root}"
    return [*lines, "", total] if found else [f"no store in {root}"]


def _cells(entry: Entry) -> list[str]:
    now = time.time()
    if entry.state == "whole":
        counts = [f"{entry.rows:,}", f"{entry.samples:,}", f"{entry.tokens:,}"]
        text = f"{entry.files[0]} and {len(entry.files) - 1} more" if entry.files[1:] else "".join(entry.files)
    else:
        counts, text = ["", "", ""], f"{entry.state}: {entry.path.name}"
    used = "now" if entry.in_use else ago(now - entry.used)
    return [entry.key[:SHOWN_KEY], *counts, size(entry.num_bytes), ago(now - entry.made), used, text]


def _figures(root: Path, found: list[Entry]) -> dict[str, Any]:
    """Times are seconds since 1970."""
    return {
        "folder": str(root),
        "num_bytes": sum(entry.num_bytes for entry in found),
        "stores": [
            {
                "key": entry.key,
                "name": entry.path.name,
                "state": entry.state,
                "in_use": entry.in_use,
                "num_bytes": entry.num_bytes,
                "made": entry.made,
                "used": entry.used,
                "files": entry.files,
                "rows": entry.rows,
                "samples": entry.samples,
                "tokens": entry.tokens,
            }
            for entry in found
        ],
    }


def size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"
