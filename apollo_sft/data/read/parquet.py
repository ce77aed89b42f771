"""Read rows of parquet files, one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from apollo_sft.data.read.batches import existing, pulled, refuse_huge, rows_of, to_python, unreadable
from apollo_sft.data.read.files import READ_BYTES, REMOTE_READ_BYTES, Columns, Found, cause, is_remote, shown
from apollo_sft.errors import DataError


def num_rows(file: str) -> int:
    """Read the number of rows from the footer. Raises: DataError."""
    return int(_open(file).metadata.num_rows)


def column_names(file: str) -> list[str]:
    """List the columns. Raises: DataError."""
    names: list[str] = _open(file).schema_arrow.names
    return names


def read_rows(file: str, columns: Columns, first_row: int) -> Found:
    """Yield the rows from `first_row` on; row groups before it are not read. Raises: DataError for a file."""
    parquet = _open(file)
    metadata = parquet.metadata
    names = existing(file, parquet.schema_arrow.names, columns)
    _refuse_huge_cells(file, metadata, names)

    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    group = 0
    at = 0  # the first row of the group, later of the batch
    while group < len(sizes) and at + sizes[group] <= first_row:
        at += sizes[group]
        group += 1

    groups = list(range(group, len(sizes)))
    batches = parquet.iter_batches(batch_size=_batch_rows(metadata, names), row_groups=groups, columns=names)
    for batch in pulled(file, batches, at):
        wanted = batch.slice(max(first_row - at, 0))
        yield from to_python(file, wanted, at + batch.num_rows - wanted.num_rows)
        at += batch.num_rows

    # A damaged file may end early without an error of Arrow's.
    if at != metadata.num_rows:
        raise unreadable(file, at, f"{at:,} of the {metadata.num_rows:,} rows of its footer")


def _batch_rows(metadata: Any, names: list[str]) -> int:
    """Return how many rows are read at a time.

    With a dictionary every row of a batch may be the largest text of its column: a small file, a huge batch.
    """
    largest = 1
    for index in range(metadata.num_row_groups):
        for _, column in _columns(metadata.row_group(index), names):
            if column.has_dictionary_page:
                largest = max(largest, column.total_uncompressed_size)
    return rows_of(largest)


def _refuse_huge_cells(file: str, metadata: Any, names: list[str]) -> None:
    first = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for name, column in _columns(group, names):
            refuse_huge(file, name, column.total_uncompressed_size, first, group.num_rows)
        first += group.num_rows


def _columns(group: Any, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (name, metadata) of the columns of a row group that belong to `names`; a struct has one for each field."""
    for index in range(group.num_columns):
        column = group.column(index)
        name = column.path_in_schema.split(".")[0]
        if name in names:
            yield name, column


def _open(file: str) -> Any:
    try:
        return pq.ParquetFile(
            _source(file),
            buffer_size=REMOTE_READ_BYTES if is_remote(file) else READ_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    except DataError:
        raise
    except Exception as error:
        fix = None
        if Path(file).suffix in (".csv", ".tsv", ".txt", ".xlsx", ".pkl"):
            fix = "convert it to parquet"
        raise DataError(
            f"{shown(file)}: not a readable parquet file",
            found=cause(error),
            expected="parquet; or JSON lines (.jsonl) or Arrow (.arrow) by the extension",
            fix=fix,
        ) from error


def _source(file: str) -> Any:
    """Return a path, or a remote file that reads the ranges that parquet requests, without a block around each."""
    if not is_remote(file):
        return file

    from apollo_sft.data.read.remote import filesystem

    fs, path = filesystem(file, "data")
    return fs.open(path, "rb", cache_type="none")
