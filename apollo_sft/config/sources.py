"""The entries of data.train_files and data.val_files: the paths in them, what each is called, and what cannot be."""

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
    """Every path, in order."""
    return tuple(path for entry in entries for path in own_paths(entry))


def own_paths(entry: str | FileSet) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry.path


def named(entries: Entries) -> dict[str, str | FileSet]:
    """The entries by name, or none where all of them are paths: these are one set of data.

    An entry without a name is called after its file or folder; where two would be called the same, the folders above
    them are added.
    """
    return dict(zip(_names(entries), entries, strict=True)) if _are_sources(entries) else {}


def refused(data: DataConfig) -> Iterator[ConfigError]:
    """What the entries themselves show to be impossible."""
    for key, entries in (("data.train_files", data.train_files), ("data.val_files", data.val_files)):
        if not _are_sources(entries):
            continue
        yield from _same_names(key, entries)
        limit = "train_max_samples" if key == "data.train_files" else "val_max_samples"
        if getattr(data, limit) != -1:
            fix = "max_samples of each source" if limit == "train_max_samples" else "smaller files"
            yield ConfigError(
                f"data.{limit} counts over all files, but {key} has sources",
                found=getattr(data, limit),
                fix=f"data.{limit}=-1, and {fix}",
            )
        if data.custom_cls.path is not None:
            yield ConfigError(
                f"{key} has sources, but data.custom_cls reads all files itself",
                fix="paths alone; the class may repeat rows or leave them out",
            )
    yield from _numbers(data.train_files)


def _numbers(entries: Entries) -> Iterator[ConfigError]:
    has_weights = any(isinstance(entry, Source) and entry.weight is not None for entry in entries)
    for number, entry in enumerate(entries):
        weight = entry.weight if isinstance(entry, Source) else None
        most = entry.max_samples if isinstance(entry, Source) else None
        where = f"data.train_files[{number}]"
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
    parts = [_parts(entry) for entry in entries]
    depths = [1] * len(parts)
    while True:
        names = ["_".join(reversed(of_entry[:depth])) for of_entry, depth in zip(parts, depths, strict=True)]
        counts = Counter(names)
        longer = [i for i, name in enumerate(names) if counts[name] > 1 and depths[i] < len(parts[i])]
        if not longer:
            return names
        for i in longer:
            depths[i] += 1


def _parts(entry: str | FileSet) -> list[str]:
    """What an entry may be called by, the last part of its first path first; the name alone if it has one."""
    if isinstance(entry, FileSet) and entry.name is not None:
        return [entry.name]
    *folders, last = redact(own_paths(entry)[0]).rpartition("://")[2].strip("/").split("/")
    for ending in ENDINGS:
        last = last.removesuffix(ending)
    whole = [re.sub(r"[^A-Za-z0-9_.-]+", "-", part) for part in (*folders, last) if not set(part) & set("*?[")]
    return [part for part in reversed(whole) if part.strip("-.")] or ["data"]
