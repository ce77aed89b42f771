"""Read rows of Arrow IPC files and streams, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from apollo_sft.data.read.batches import existing, pulled, refuse_huge, rows_of, to_python
from apollo_sft.data.read.files import Columns, Found, cause, is_remote, open_file, shown
from apollo_sft.errors import DataError

FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a complete stream. Source: "IPC Streaming Format" in Arrow's columnar format."""


def num_rows(file: str) -> int:
    """Count the rows of all batches. Raises: DataError."""
    return sum(batch.num_rows for batch in pulled(file, _Arrow(file).batches(), 0))


def column_names(file: str) -> list[str]:
    """List the columns. Raises: DataError."""
    names: list[str] = _Arrow(file).schema.names
    return names


def read_rows(file: str, columns: Columns, first_row: int) -> Found:
    """Yield the rows from `first_row` on; batches before it are not converted. Raises: DataError for a file."""
    arrow = _Arrow(file)
    at = 0  # the first row of the batch
    names = existing(file, arrow.schema.names, columns)
    for batch in pulled(file, arrow.batches(names), 0):
        begin = max(first_row - at, 0)
        for part in _parts(file, batch, begin, at):
            yield from to_python(file, part, at + begin)
            begin += part.num_rows
        at += batch.num_rows


def _parts(file: str, batch: Any, begin: int, at: int) -> Iterator[Any]:
    """Yield a batch in parts of few rows, as few as the size of its cells demands."""
    dictionaries = [column.dictionary.nbytes for column in batch.columns if pa.types.is_dictionary(column.type)]
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        refuse_huge(file, name, column.nbytes, at, batch.num_rows)

    # Every row may be the largest text of a dictionary.
    size = rows_of(max(dictionaries, default=1))
    for first in range(begin, batch.num_rows, size):
        yield batch.slice(first, size)


class _Arrow:
    """An IPC file or stream. Raises: DataError for a file that is neither, or a stream that is cut short."""

    def __init__(self, file: str) -> None:
        self._file = file
        try:
            self.schema = self._reader(None)[0].schema
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{shown(file)}: not a readable Arrow file",
                found=cause(error),
                expected="an IPC file or stream of Arrow (.feather: version 2)",
            ) from error

    def batches(self, names: Sequence[str] | None = None) -> Iterator[Any]:
        """Yield batches of these columns; None: of the first column, to count."""
        fields = [index for index, name in enumerate(self.schema.names) if names is None or name in names]
        if names is None:
            fields = fields[:1]
        reader, stream = self._reader(fields)
        if stream is None:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
            return

        yield from reader
        if stream.tell() < stream.size():  # a read that gave nothing looks like the end
            raise pa.ArrowInvalid(f"it ended after {stream.tell():,} of {stream.size():,} bytes")

    def _reader(self, fields: list[int] | None) -> tuple[Any, Any]:
        """Return a reader, and the source of a stream, None for a file."""
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        source = pa.PythonFile(open_file(self._file), mode="r") if is_remote(self._file) else pa.memory_map(self._file)

        is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
        if not is_file:
            source.seek(max(source.size() - len(END_OF_STREAM), 0))
            if source.read() != END_OF_STREAM:
                raise pa.ArrowInvalid("it does not end as a stream of Arrow does: it is cut short, or no stream")

        source.seek(0)
        if is_file:
            return pa.ipc.open_file(source, options=options), None
        return pa.ipc.open_stream(source, options=options), source
