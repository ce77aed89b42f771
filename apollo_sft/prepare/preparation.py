"""Write the rows of a source as files of every split, `rejected.jsonl` and the manifest, for every data set alike."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from apollo_sft.checkpoint.publish import describe_file
from apollo_sft.data.read.files import Columns, Row, known_kind
from apollo_sft.data.read.rows import read_rows
from apollo_sft.errors import DataError
from apollo_sft.prepare.columns import has_any
from apollo_sft.prepare.output import Output, SplitWriter
from apollo_sft.prepare.raw_sources import Source, column_names
from apollo_sft.prepare.records import Origin
from apollo_sft.prepare.rejection import RejectedRow

Say = Callable[[str], None]
PREVIEWED = 2
SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Task:
    """One data set: how its rows are converted."""

    dataset: str
    data_source: str
    schema: pa.Schema
    convert: Callable[[Row, Origin], Row]

    needed: Mapping[str, tuple[str, ...]]
    """What a file must hold, and the columns that may hold it."""

    describe: Callable[[], list[str]]
    """Returns lines about what was found."""

    instruction: str = ""

    left_out: Counter[str] = field(default_factory=Counter)
    """What rows have and what is not written: columns and keys of messages, with the number of rows or messages."""


@dataclass(frozen=True, slots=True)
class Split:
    """The result of one split."""

    file: Path
    rows_in: int
    rows_out: int

    rejected: Counter[str]
    """Rejected rows by reason."""

    largest: int
    """Bytes of text in its largest row."""


def prepare(task: Task, source: Source, output: Output, say: Say) -> dict[str, Split]:
    """Write every split of `source`, and report what was taken and what was rejected.

    Raises: DataError when columns are missing, a file is damaged, or a split is left without a row.
    """
    check_columns(task, source)
    # Before the rows are read: the manifest names the files as they were when the work began.
    files = itertools.chain.from_iterable(source.files.values())
    inputs = {str(file): describe_file(file) for file in files}
    splits = {split: _write(task, source, split, output) for split in source.splits}
    for line in task.describe():
        say(line)

    shared = _report_overlap(output, splits, say)

    facts: dict[str, Any] = {
        "dataset": task.dataset,
        "data_source": task.data_source,
        "instruction": task.instruction,
        "source": {"kind": source.kind, "name": source.name, "revision": source.revision, "files": inputs},
    }
    facts["left_out"] = dict(sorted(task.left_out.items()))
    for key, count in task.left_out.most_common():
        say(f"not written: {key}, which {count:,} have")
    output.publish(facts | splits_facts(splits, shared))
    return splits


def preview(task: Task, source: Source) -> list[str]:
    """Return the first rows as they would be written, a line a message; for a rejected row the reason."""
    lines = []
    split = source.splits[0]
    for index, (ref, row) in enumerate(islice(source.rows(split), PREVIEWED)):
        lines.append(f"-- {ref}")
        try:
            is_json = known_kind(ref.file) == "JSON lines"
            lines += _shown(task.convert(row, Origin(task.data_source, split, index, is_json)))
        except RejectedRow as rejected:
            lines.append(f"   rejected: {rejected.reason}")

    return lines


def _shown(row: Row) -> list[str]:
    """Return a row as lines, one for each message."""
    messages = row.get("messages") or [*row["prompt"], {"role": "assistant", "content": row["answer"]}]
    lines = []
    for message in messages:
        words = [f"   {message['role']}:"]
        if message["content"] is not None:
            words.append(json.dumps(message["content"], ensure_ascii=False))
        for call in message.get("tool_calls", ()):
            words.append(f"calls {call['function']['name']} {call['function']['arguments']}")
        line = " ".join(words)
        if len(line) > SHOWN_CHARACTERS:
            line = line[:SHOWN_CHARACTERS] + "…"
        lines.append(line)

    return lines


def splits_facts(splits: dict[str, Split], shared: dict[str, int]) -> dict[str, Any]:
    """Return the part of the manifest about the rows, and the version that wrote them."""
    counts = {
        name: {"rows_in": split.rows_in, "rows_out": split.rows_out, "rejected": dict(sorted(split.rejected.items()))}
        for name, split in splits.items()
    }
    version = importlib.metadata.version("apollo-sft")
    return {"splits": counts, "prompts_also_in_first_split": shared, "apollo_sft": version}


def check_columns(task: Task, source: Source) -> None:
    """Raise DataError when a file has no column for what the task needs."""
    for files in source.files.values():
        for file in files:
            _check_columns(task, file)


def _check_columns(task: Task, file: Path) -> None:
    names = column_names(file)
    for what, paths in task.needed.items():
        if not has_any(names, paths):
            raise DataError(
                f"{file} has no column for the {what}",
                found=f"columns {', '.join(names) or '(none)'}",
                expected=f"one of {', '.join(dict.fromkeys(path.partition('.')[0] for path in paths))}",
                fix="apollo-sft prepare custom --help: it takes columns of any name",
            )


def _write(task: Task, source: Source, split: str, output: Output) -> Split:
    """Convert and write the rows of one split. Raises: DataError when no row is left."""
    path = output.staging / f"{split}.parquet"
    reasons: Counter[str] = Counter()
    rows_in = 0
    largest = 0
    with SplitWriter(path, task.schema) as writer:
        for index, (ref, row) in enumerate(source.rows(split)):
            rows_in += 1
            # A rejected row is listed, and does not end the work: foreign data always have some.
            try:
                made = task.convert(row, Origin(task.data_source, split, index, known_kind(ref.file) == "JSON lines"))
                largest = max(largest, _num_bytes(made))
                writer.add(made)
            except RejectedRow as rejected:
                reasons[rejected.reason] += 1
                output.reject(split, ref, rejected.reason)

    if writer.num_rows == 0:
        found = "; ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"split {split!r}: no row is left, nothing was written",
            found=found or "a file without rows",
            expected=f"rows that {task.dataset} can be made of, in {source.name}",
        )

    return Split(output.folder / path.name, rows_in, writer.num_rows, reasons, largest)


def _num_bytes(row: Row) -> int:
    """Return the bytes of the texts of a row. Raises: RejectedRow for text that no file can hold."""
    texts = [row.get(name) for name in ("messages", "tools", "prompt", "answer", "reward_model")]
    try:
        return len(json.dumps(texts, ensure_ascii=False).encode())
    except UnicodeEncodeError as error:
        raise RejectedRow("a text is not valid Unicode") from error


def _report_overlap(output: Output, splits: dict[str, Split], say: Say) -> dict[str, int]:
    """Count the rows of later splits whose prompt is in the first one too, and report them; none is removed."""
    for name, split in splits.items():
        say(f"{name}: {split.rows_in:,} rows read, {split.rows_out:,} written")
        for reason, count in split.rejected.most_common():
            say(f"  {count:,} rejected: {reason}")

    # Held-out rows that were trained on would show a loss that is too low.
    first, *others = splits
    shared = {name: _num_shared(output.staging, first, name) for name in others}
    for name, count in shared.items():
        if count:
            say(f"warning: {count:,} rows of {name} have a question of {first}: they measure memory, not learning")

    return shared


def _num_shared(folder: Path, first: str, other: str) -> int:
    """Count the rows of a split whose prompt is in the first one. Only the hashes of its own prompts are kept."""
    wanted = Counter(_prompts(folder / f"{other}.parquet"))
    seen = set()
    for prompt in _prompts(folder / f"{first}.parquet"):
        if prompt in wanted:
            seen.add(prompt)
    return sum(wanted[prompt] for prompt in seen)


def _prompts(file: Path) -> Iterator[int]:
    """Yield the hash of each row's prompt: the question, or the messages of a conversation but the assistant's."""
    column = "messages"
    if "question" in column_names(file):
        column = "question"

    for _, row in read_rows([str(file)], Columns((column,), (), {})):
        value = row[column]
        if not isinstance(value, str):
            value = str([message["content"] for message in value if message["role"] != "assistant"])
        yield hash(value)
