"""`apollo-sft store`: list the tokenised data that trainings keep, and remove some."""

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
tokens and size, when it was made and used last; and the remains of builds that were killed. `prune` removes some. What
a process builds or has open is never removed. A removed store is made again when a training needs it.

  KEY               of a store, or the first 6 or more characters of it
  --older-than AGE  stores not used for so long: 30d, 12h, 2w
  --unfinished      remains of killed or refused builds, and damaged stores
  --all             every store, and remembered hashes of files
  --dry-run         show what would be removed, and remove nothing
  --dir DIR         the folder of stores [data.store_dir's default]
  --json            as one JSON object
  --help            this text

Exit codes: 0 done, 1 a file cannot be read or removed, 2 refused."""
SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SHORTEST_KEY = 6
SHOWN_KEY = 12


def main(arguments: list[str]) -> int:
    """List or remove stores. Return the exit code. Raises: ApolloError."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    options = _parse(arguments)
    from apollo_sft.data.store.open import store_root
    from apollo_sft.tools.store_list import entries

    root = store_root(options.dir)
    try:  # other processes may remove entries meanwhile
        found = entries(root)
        if options.what == "prune":
            return _prune(root, found, options)
        if options.json:
            print(json.dumps(_figures(root, found), indent=2))
        else:
            print("\n".join(_table(root, found)))
        return 0
    except OSError as error:
        raise ApolloError(f"{root}: {error.strerror}", found=error.filename) from error


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Read the options. Raises: ConfigError."""
    parser = Parser(prog="apollo-sft store", add_help=False, allow_abbrev=False)
    parser.add_argument("what", choices=["list", "prune"])
    parser.add_argument("keys", nargs="*", metavar="KEY")
    parser.add_argument("--older-than", type=_age)
    parser.add_argument("--dir")
    for flag in ("--unfinished", "--all", "--dry-run", "--json"):
        parser.add_argument(flag, action="store_true")

    options = parser.parse_intermixed_args(arguments)

    # `prune` alone removes nothing: everything would be too much to be the default.
    selects = options.keys or options.older_than is not None or options.unfinished or options.all
    if options.what == "list" and (selects or options.dry_run):
        raise ConfigError("apollo-sft store list shows all stores", fix="apollo-sft store prune removes some")
    if options.what == "prune" and not selects:
        raise ConfigError(
            "apollo-sft store prune needs to know what to remove",
            expected="keys, --older-than AGE, --unfinished or --all",
            fix="apollo-sft store list shows what there is",
        )

    return options


def _age(text: str) -> float:
    """Read an age such as 30d, and return its seconds."""
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
        is_gone = not entry.in_use
        if not options.dry_run:
            is_gone = remove(entry)
        if is_gone:
            gone.append(entry)
        else:
            kept.append(entry)

    # Hashes belong to no store; a training that needs one computes it again.
    if options.all and not options.dry_run:
        for path in hashes(root):
            path.unlink(missing_ok=True)

    if options.json:
        facts = {"dry_run": options.dry_run, "removed": _figures(root, gone), "kept": _figures(root, kept)}
        print(json.dumps(facts, indent=2))
        return 0

    removed = "removed"
    freed = "freed"
    if options.dry_run:
        removed = "would remove"
        freed = "would be freed"

    for entry in gone:
        print(f"{removed} {_name(entry)}, {size(entry.num_bytes)}")

    for entry in kept:
        reason = "a process uses it"
        if entry.state == "being built":
            reason = "a process builds it"
        print(f"kept {_name(entry)}: {reason}")

    print(f"{size(sum(entry.num_bytes for entry in gone))} {freed}; there were {len(found)} entries in {root}")
    return 0


def _chosen(found: list[Entry], options: argparse.Namespace) -> list[Entry]:
    """Return the entries that the options select. Raises: ConfigError for a key of no store, or of several."""
    keys = set()
    for text in options.keys:
        # A short beginning would select a store by accident, and what is removed takes hours to make again.
        matching = {entry.key for entry in found if len(text) >= SHORTEST_KEY and entry.key.startswith(text)}
        if len(matching) != 1:
            what = f"{text} names several stores"
            if not matching:
                what = f"{text} names no store"
            raise ConfigError(
                what,
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
    """Return the name of an entry in a message."""
    if entry.state != "whole":
        return f"{entry.path.name}, {entry.state}"
    key = entry.key[:SHOWN_KEY]
    if not entry.files:
        return key
    return f"{key} ({_files(entry)})"


def _files(entry: Entry) -> str:
    """Return the first file of a store, and how many others it was made of."""
    if len(entry.files) > 1:
        return f"{entry.files[0]} and {len(entry.files) - 1} more"
    return "".join(entry.files)


def _table(root: Path, found: list[Entry]) -> list[str]:
    """Return the lines of `store list`."""
    if not found:
        return [f"no store in {root}"]

    header = ["key", "rows", "samples", "tokens", "size", "made", "used", "files"]
    rows = [header, *(_cells(entry) for entry in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for key, *cells in rows:
        middle = [cell.rjust(width) for cell, width in zip(cells[:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([key.ljust(widths[0]), *middle, cells[-1]]).rstrip())

    total = f"{len(found)} entries, {size(sum(entry.num_bytes for entry in found))} in {root}"
    return [*lines, "", total]


def _cells(entry: Entry) -> list[str]:
    """Return the row of an entry."""
    counts = ["", "", ""]
    text = f"{entry.state}: {entry.path.name}"
    if entry.state == "whole":
        counts = [f"{entry.rows:,}", f"{entry.samples:,}", f"{entry.tokens:,}"]
        text = _files(entry)

    now = time.time()
    used = ago(now - entry.used)
    if entry.in_use:
        used = "now"
    return [entry.key[:SHOWN_KEY], *counts, size(entry.num_bytes), ago(now - entry.made), used, text]


def _figures(root: Path, found: list[Entry]) -> dict[str, Any]:
    """Return the figures of `--json`. Times are seconds since 1970."""
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
    """Return bytes in a unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def ago(seconds: float) -> str:
    """Return how long ago something was."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"
