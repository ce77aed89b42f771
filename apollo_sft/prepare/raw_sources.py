"""Read rows: files of a split in a local folder, in one local file, or in a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq

from apollo_sft.data.read.files import Columns, Row
from apollo_sft.data.read.rows import read_rows
from apollo_sft.errors import DataError
from apollo_sft.types import RowRef

SUFFIXES = (".parquet", ".jsonl", ".json")
INSPECTED_ROWS = 100
PEEKED = 64


@dataclass(frozen=True, slots=True)
class Source:
    """The source of rows. `kind`, `name` and `revision` are written into the manifest."""

    kind: str
    name: str
    revision: str | None

    files: dict[str, list[Path]]
    """The files of each split, in order."""

    generated: dict[str, list[Row]] = field(default_factory=dict)
    """The rows themselves, by split, where they come from no file."""

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return [*self.files, *self.generated]

    def rows(self, split: str) -> Iterator[tuple[RowRef, Row]]:
        """Yield every row of the split with its place. Raises: DataError for a damaged file, naming file and line."""
        if split in self.files:
            return source_rows(self.files[split])
        return ((RowRef(self.name, index), row) for index, row in enumerate(self.generated[split]))


def local_source(path: Path, splits: Sequence[str], subset: str | None) -> Source:
    """Return the files of `splits` below a folder, or one file for one split.

    Raises: DataError when there is no such path, or a split is missing or found twice.
    """
    if path.is_file():
        return Source("local", str(path), None, {_only_split(path, splits): [path]})
    if not path.is_dir():
        raise DataError("no such file or folder", found=path, expected="a folder, a parquet file or JSON lines")
    if next(path.rglob("dataset_info.json"), None) and next(path.rglob("*.arrow"), None):
        raise DataError(
            f"{path} was written by save_to_disk of the library datasets",
            found="Arrow files",
            expected="parquet or JSON lines",
            fix="datasets.load_from_disk(FOLDER)[SPLIT].to_parquet(SPLIT + '.parquet') for every split",
        )

    # Sorted: the order of a directory differs between machines, and with it the order of rows.
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in SUFFIXES)
    files: dict[str, list[Path]] = {}
    for split in splits:
        files[split] = [path / name for name in files_of_split(names, split, subset, str(path))]

    return Source("local", str(path), None, files)


def _only_split(file: Path, splits: Sequence[str]) -> str:
    if file.suffix not in SUFFIXES:
        raise DataError(f"{file}: an unknown kind of file", found=file.suffix, expected=", ".join(SUFFIXES))
    if len(splits) != 1:
        raise DataError(
            f"{file} is one split",
            found=f"--splits {','.join(splits)}",
            expected="one split for one file",
            fix=f"--splits {splits[0]}, or the folder that holds a file of every split",
        )

    return splits[0]


def files_of_split(names: Sequence[str], split: str, subset: str | None, where: str) -> list[str]:
    """Return the `names` (relative, with `/`) that hold `split`.

    Such as `train.jsonl`, `data/train-00000-of-00002.parquet`, `train/0.parquet`. `subset`: the folder to use when
    several hold the split.

    Raises: DataError when none does, or it is not clear which.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if path.suffix in SUFFIXES and not hidden and _holds(path, split):
            folder = path.parent
            if folder.name == split:
                folder = folder.parent
            groups.setdefault((folder.as_posix(), path.suffix), []).append(name)

    # A subset is only looked at where it exists: a folder without subsets needs no option.
    of_subset = {key: files for key, files in groups.items() if PurePosixPath(key[0]).name == subset}
    groups = of_subset or groups
    if not groups:
        found = sorted({PurePosixPath(name).name for name in names if PurePosixPath(name).suffix in SUFFIXES})
        raise DataError(
            f"{where} has no split {split!r}",
            found=", ".join(found[:10]) or "no parquet or JSON file",
            expected=f"{split}.parquet, {split}.jsonl, {split}-*.parquet or {split}/*.parquet",
            fix="name the splits that there are: --splits NAME,NAME",
        )
    if len(groups) > 1:
        raise DataError(
            f"{where}: several files may be the split {split!r}",
            found=", ".join(sorted(files[0] for files in groups.values())[:10]),
            fix="name one folder: --subset NAME, or --local_dataset_path FOLDER",
        )

    return sorted(next(iter(groups.values())))


def _holds(path: PurePosixPath, split: str) -> bool:
    return (
        path.stem == split
        or path.stem.startswith((f"{split}-", f"{split}_0", f"{split}."))
        or (path.parent.name == split)
    )


def column_names(file: Path) -> list[str]:
    """Return the columns of a parquet file; the keys of the first rows of a JSON file."""
    if file.suffix == ".parquet":
        return _parquet_columns(file)
    names: dict[str, None] = {}
    for _, row in islice(_json_rows(file), INSPECTED_ROWS):
        names |= dict.fromkeys(row)
    return list(names)


def source_rows(files: Sequence[Path]) -> Iterator[tuple[RowRef, Row]]:
    """Yield every row of the files with its place. Memory does not grow with a parquet or a JSON lines file.

    Raises: DataError for a damaged file, naming file and line.
    """
    for file in files:
        if file.suffix == ".parquet":
            names = column_names(file)
            yield from read_rows([str(file)], Columns((), tuple(names), {}))
        else:
            yield from _json_rows(file)


def _parquet_columns(file: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(file).names
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable parquet file", found=str(error).splitlines()[0]) from error
    return names


def _json_rows(file: Path) -> Iterator[tuple[RowRef, Row]]:
    """Yield the rows of JSON lines; or, in a `.json` file that begins with `[`, of one list, which is read at once."""
    with file.open(encoding="utf-8-sig") as lines:
        try:
            if file.suffix == ".json" and lines.read(PEEKED).lstrip().startswith("["):
                lines.seek(0)
                yield from _list_rows(file, lines.read())
                return
            lines.seek(0)
            yield from _line_rows(file, lines)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: the text is not valid UTF-8", found=error) from error


def _line_rows(file: Path, lines: Iterator[str]) -> Iterator[tuple[RowRef, Row]]:
    index = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield RowRef(str(file), index), _object(line, f"{file} line {number}")
            index += 1


def _list_rows(file: Path, text: str) -> Iterator[tuple[RowRef, Row]]:
    rows = _parsed(text, str(file))
    assert isinstance(rows, list)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file} row {index}: not an object", found=f"{type(row).__name__} {str(row)[:80]!r}")
        yield RowRef(str(file), index), row


def _object(line: str, where: str) -> Row:
    row = _parsed(line, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object", found=line.strip()[:80], expected='{"question": …, "answer": …}')
    return row


def _parsed(text: str, where: str) -> object:
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON", found=str(error), fix="repair the file: nothing was written"
        ) from error
    return parsed
