"""The entries of data.train_files and data.val_files: their paths, their names, and what is refused in them.

[{path: math/train.parquet}, {path: code/train.parquet}], for example: both would be called `train`, so their folders
are added, and they are `math_train` and `code_train`. [math/train.parquet, code/train.parquet] has no names: paths
alone are one set of data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from apollo_sft.config.schema import DataConfig, FileSet, Source
from apollo_sft.errors import ConfigError
from apollo_sft.redact import redact

Entries = Sequence[str | FileSet]
ENDINGS = (".gz", ".zst", ".parquet", ".jsonl", ".ndjson", ".json", ".arrow", ".feather")


def paths_of(entries: Entries) -> tuple[str, ...]:
    """List every path, in order."""
    paths: list[str] = []
    for entry in entries:
        paths += own_paths(entry)
    return tuple(paths)


def own_paths(entry: str | FileSet) -> tuple[str, ...]:
    """Return the paths of one entry."""
    return (entry,) if isinstance(entry, str) else entry.path


def named(entries: Entries) -> dict[str, str | FileSet]:
    """Return the entries by name; none where all of them are paths, which are one set of data.

    An entry without a name gets the name of its file or folder; where two names would be equal, the folders above them
    are added.
    """
    if not _are_sources(entries):
        return {}
    return dict(zip(_names(entries), entries, strict=True))


def refused(data: DataConfig) -> Iterator[ConfigError]:
    """Yield an error for each impossible entry, and for each key that sources exclude."""
    yield from _refused_keys(data, "train_files", "train_max_samples", "max_samples of each source")
    yield from _refused_keys(data, "val_files", "val_max_samples", "smaller files")
    yield from _refused_numbers(data.train_files)


def _refused_keys(data: DataConfig, name: str, limit: str, instead: str) -> Iterator[ConfigError]:
    key = f"data.{name}"
    entries = getattr(data, name)
    if not _are_sources(entries):
        return

    yield from _same_names(key, entries)
    if getattr(data, limit) != -1:
        yield ConfigError(
            f"data.{limit} counts over all files, but {key} has sources",
            found=getattr(data, limit),
            fix=f"data.{limit}=-1, and {instead}",
        )

    if data.custom_cls.path is not None:
        yield ConfigError(
            f"{key} has sources, but data.custom_cls reads all files itself",
            fix="paths alone; the class may repeat rows or leave them out",
        )


def _refused_numbers(entries: Entries) -> Iterator[ConfigError]:
    """Yield an error for each entry whose share of an epoch is not determined, or is given twice."""
    has_weights = any(isinstance(entry, Source) and entry.weight is not None for entry in entries)
    for number, entry in enumerate(entries):
        where = f"data.train_files[{number}]"
        weight: float | None = None
        most: int | None = None
        if isinstance(entry, Source):
            weight = entry.weight
            most = entry.max_samples

        if weight is not None and most is not None:
            yield ConfigError(
                f"{where} has both weight and max_samples", found=f"{weight:g} and {most:,}", fix="give one of them"
            )

        if has_weights and weight is None and most is None:
            yield ConfigError(
                f"{where} has neither weight nor max_samples, but another source has a weight",
                found=own_paths(entry)[0],
                expected="a weight for it too, or max_samples",
            )


def _same_names(key: str, entries: Entries) -> Iterator[ConfigError]:
    for name, count in Counter(_names(entries)).items():
        if count > 1:
            yield ConfigError(f"{key}: {count} sources are called {name}", fix="give each a name of its own")


def _are_sources(entries: Entries) -> bool:
    return any(isinstance(entry, FileSet) for entry in entries)


def _names(entries: Entries) -> list[str]:
    """Return a name for each entry: the last parts of its first path, as many as make it differ from the others."""
    parts = [_parts(entry) for entry in entries]
    depths = [1] * len(parts)

    # In each round, the names that occur twice get one folder more, until none does or no folder is left.
    while True:
        names = ["_".join(reversed(of_entry[:depth])) for of_entry, depth in zip(parts, depths, strict=True)]
        counts = Counter(names)
        longer = [i for i, name in enumerate(names) if counts[name] > 1 and depths[i] < len(parts[i])]
        if not longer:
            return names
        for i in longer:
            depths[i] += 1


def _parts(entry: str | FileSet) -> list[str]:
    """Return the parts from which an entry's name is made: those of its first path, the last one first.

    An entry with a name of its own has that alone.
    """
    if isinstance(entry, FileSet) and entry.name is not None:
        return [entry.name]

    # Without a secret in a URL: the name becomes part of the names of metrics.
    *folders, last = redact(own_paths(entry)[0]).rpartition("://")[2].strip("/").split("/")
    for ending in ENDINGS:
        last = last.removesuffix(ending)

    # A part with a wildcard names nothing.
    whole = [re.sub(r"[^A-Za-z0-9_.-]+", "-", part) for part in (*folders, last) if not set(part) & set("*?[")]
    return [part for part in reversed(whole) if part.strip("-.")] or ["data"]
