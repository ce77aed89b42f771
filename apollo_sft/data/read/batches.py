"""Turn batches of columns into rows, for parquet and Arrow. An error names its row and column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apollo_sft.data.read.files import Columns, Found, Row, cause, is_remote, lacking, shown
from apollo_sft.errors import DataError

BATCH_ROWS = 512
MAX_CELL_BYTES = 1 << 26
"""Mean size of the cells of a column in a row group, unpacked. A few kilobytes of file can claim gigabytes."""

MAX_BATCH_BYTES = 1 << 29
FEWEST_ROWS = 4


def pulled(file: str, batches: Iterator[Any], done: int) -> Iterator[Any]:
    """Yield the batches. `done`: rows before them. Raises: DataError for any error of Arrow or of a remote store."""
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise unreadable(file, done, cause(error)) from error
        if batch is None:
            return
        yield batch
        done += batch.num_rows


def unreadable(file: str, done: int, found: str) -> DataError:
    """Return the error about a file that cannot be read after `done` rows."""
    fix = "write the file again (with smaller row groups if cells are very large)"
    if is_remote(file):
        fix = "start again; if it fails again, check the file and the network"
    return DataError(f"{shown(file)}: the file cannot be read after row {done}", found=found, fix=fix)


def rows_of(largest_cell_bytes: int) -> int:
    """Return how many rows a batch may have, so that it fits into memory."""
    return int(max(FEWEST_ROWS, min(BATCH_ROWS, MAX_BATCH_BYTES // max(largest_cell_bytes, 1))))


def refuse_huge(file: str, name: str, num_bytes: int, first: int, num_cells: int) -> None:
    """Raise DataError for a column of `num_cells` rows from row `first` on, with cells that are too large."""
    if num_bytes > MAX_CELL_BYTES * max(num_cells, 1):
        raise DataError(
            f"{shown(file)} rows {first} to {first + num_cells - 1}, column {name}: the cells are too large",
            found=f"{num_bytes:,} bytes in {num_cells:,} rows",
            expected=f"at most {MAX_CELL_BYTES:,} bytes a cell",
        )


def to_python(file: str, batch: Any, first: int) -> Found:
    """Return (row, values) for each row of a batch, of which the first is row `first`."""
    try:
        batch.validate(full=True)
        rows: list[Row | DataError] = batch.to_pylist()
    except Exception:  # damaged data may raise anything: each cell is read alone
        rows = [_one_row(file, batch, i, first) for i in range(batch.num_rows)]
    return zip(range(first, first + len(rows)), rows, strict=True)


def _one_row(file: str, batch: Any, index: int, first: int) -> Row | DataError:
    """Read row `index` of `batch` column by column, so that an error can name its place."""
    row: Row = {}
    for name in batch.schema.names:
        where = f"{shown(file)} row {first + index}, column {name}"
        cell = batch.column(name).slice(index, 1)
        # Not before the check: reading a damaged cell could read memory outside of the column.
        try:
            cell.validate(full=True)
            row[name] = cell[0].as_py()
        except Exception as error:
            what = "the cell cannot be read"
            if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
                what = "the text is not valid UTF-8"
            return DataError(f"{where}: {what}", found=cause(error))
    return row


def existing(file: str, present: list[str], columns: Columns) -> list[str]:
    """Return the wanted columns that are among those `present`.

    Raises: DataError for a required column that is missing, and for a wanted one that is there twice.
    """
    wanted = dict.fromkeys((*columns.required, *columns.optional))
    for name in columns.required:
        if name not in present:
            raise lacking(shown(file), name, present, columns)

    # Which one of them is meant cannot be known.
    twice = [name for name in wanted if present.count(name) > 1]
    if twice:
        raise DataError(
            f"{shown(file)} has {present.count(twice[0])} columns of the name {twice[0]!r}",
            found=f"columns {', '.join(present)}",
            fix="write the file again with one of them",
        )
    return [name for name in wanted if name in present]
