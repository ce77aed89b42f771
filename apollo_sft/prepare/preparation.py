"""Source -> rows -> files of every split, `rejected.jsonl` and the manifest. The same for every data set."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from apollo_sft.checkpoint.publish import describe_file
from apollo_sft.data.read.files import Columns, Row
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
    """One data set: how a row becomes a row of ours.

    `needed`: what a file must hold, and the columns that may hold it. `describe`: lines that say what was found.
    """

    dataset: str
    data_source: str
    schema: pa.Schema
    convert: Callable[[Row, Origin], Row]
    needed: Mapping[str, tuple[str, ...]]
    describe: Callable[[], list[str]]
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class Split:
    """What became of one split. `rejected`: rows by reason. `largest`: bytes of text in its largest row."""

    file: Path
    rows_in: int
    rows_out: int
    rejected: Counter[str]
    largest: int


def prepare(task: Task, source: Source, output: Output, say: Say) -> dict[str, Split]:
    """Write every split of `source`, and say what was taken and what was rejected.

    Raises: DataError when columns are missing, a file is damaged, or a split is left without a row.
    """
    check_columns(task, source)
    inputs = {str(file): describe_file(file) for files in source.files.values() for file in files}
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
    output.publish(facts | splits_facts(splits, shared))
    return splits


def preview(task: Task, source: Source) -> list[str]:
    """The first rows as they would be written, a line a message; why, for a row that would be rejected."""
    lines = []
    split = source.splits[0]
    for index, (ref, row) in enumerate(islice(source.rows(split), PREVIEWED)):
        lines.append(f"-- {ref}")
        try:
            lines += _shown(task.convert(row, Origin(task.data_source, split, index)))
        except RejectedRow as rejected:
            lines.append(f"   rejected: {rejected.reason}")
    return lines


def _shown(row: Row) -> list[str]:
    messages = row.get("messages") or [*row["prompt"], {"role": "assistant", "content": row["answer"]}]
    lines = []
    for message in messages:
        text = "" if message["content"] is None else json.dumps(message["content"], ensure_ascii=False)
        calls = [f"calls {c['function']['name']} {c['function']['arguments']}" for c in message.get("tool_calls", ())]
        line = " ".join([f"   {message['role']}:", *([text] if text else []), *calls])
        lines.append(line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "…")
    return lines


def splits_facts(splits: dict[str, Split], shared: dict[str, int]) -> dict[str, Any]:
    """The part of the manifest that says what became of the rows, and the version that wrote them."""
    counts = {
        name: {"rows_in": split.rows_in, "rows_out": split.rows_out, "rejected": dict(sorted(split.rejected.items()))}
        for name, split in splits.items()
    }
    version = importlib.metadata.version("apollo-sft")
    return {"splits": counts, "prompts_also_in_first_split": shared, "apollo_sft": version}


def check_columns(task: Task, source: Source) -> None:
    """Raises: DataError when a file has no column for what the task needs."""
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
    path = output.staging / f"{split}.parquet"
    reasons: Counter[str] = Counter()
    rows_in = largest = 0
    with SplitWriter(path, task.schema) as writer:
        for index, (ref, row) in enumerate(source.rows(split)):
            rows_in += 1
            try:
                made = task.convert(row, Origin(task.data_source, split, index))
                largest = max(largest, _num_bytes(made))
                writer.add(made)
            except RejectedRow as rejected:
                reasons[rejected.reason] += 1
                output.reject(split, ref, rejected.reason)
    if writer.num_rows == 0:
        raise DataError(
            f"split {split!r}: no row is left, nothing was written",
            found="; ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common())
            or "a file without rows",
            expected=f"rows that {task.dataset} can be made of, in {source.name}",
        )
    return Split(output.folder / path.name, rows_in, writer.num_rows, reasons, largest)


def _num_bytes(row: Row) -> int:
    """Bytes of the texts of a row. Raises: RejectedRow for text that no file can hold."""
    texts = [row.get(name) for name in ("messages", "tools", "prompt", "answer", "reward_model")]
    try:
        return len(json.dumps(texts, ensure_ascii=False).encode())
    except UnicodeEncodeError as error:
        raise RejectedRow("a text is not valid Unicode") from error


def _report_overlap(output: Output, splits: dict[str, Split], say: Say) -> dict[str, int]:
    """Rows of the later splits whose prompt is in the first one too, counted; nothing is removed."""
    for name, split in splits.items():
        say(f"{name}: {split.rows_in:,} rows read, {split.rows_out:,} written")
        for reason, count in split.rejected.most_common():
            say(f"  {count:,} rejected: {reason}")
    first, *others = splits
    shared = {name: _num_shared(output.staging, first, name) for name in others}
    for name, count in shared.items():
        if count:
            say(f"warning: {count:,} rows of {name} ask what {first} asks too: they measure memory, not learning")
    return shared


def _num_shared(folder: Path, first: str, other: str) -> int:
    """Only the hashes of the smaller split's prompts are kept."""
    wanted = Counter(_prompts(folder / f"{other}.parquet"))
    seen = set()
    for prompt in _prompts(folder / f"{first}.parquet"):
        if prompt in wanted:
            seen.add(prompt)
    return sum(wanted[prompt] for prompt in seen)


def _prompts(file: Path) -> Iterator[int]:
    """What each row asks: the question, or all that is not the assistant's in a conversation; as a hash."""
    column = "question" if "question" in column_names(file) else "messages"
    for _, row in read_rows([str(file)], Columns((column,), (), {})):
        value = row[column]
        asked = value if isinstance(value, str) else [m["content"] for m in value if m["role"] != "assistant"]
        yield hash(str(asked))
