"""A training on prepared conversations is a training on their source, token by token."""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apollo_sft.data.read.conversation import needed_columns, parse_row
from apollo_sft.data.read.files import Columns
from apollo_sft.data.read.rows import column_names, try_rows
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.template import resolve_template
from apollo_sft.prepare.custom import Layout, recognise, task
from apollo_sft.prepare.records import CHAT_SCHEMA, Origin
from apollo_sft.prepare.rejection import RejectedRow
from tests.support.data import CHATML, data_config, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
CALLS = "{% for c in message.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>"
EVERYTHING = TOOLS + CHATML.replace("<|im_end|>", "{{ message.reasoning_content }}" + CALLS)
"""A template that writes all of a row that is said."""

ROWS = 40


def samples(file: str, without: Collection[int] = ()) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the samples of a file, in order. `without`: rows that are left out."""
    data = data_config(multiturn=True, chat_template=EVERYTHING, special_tokens_in_content="allow")
    one = Renderer(tiny_tokenizer(), resolve_template(tiny_tokenizer(), data), data)
    read = enumerate(islice(try_rows([file], needed_columns(data)), ROWS))
    rows = [parse_row(row, ref, data) for index, (ref, row) in read if index not in without]
    return [(s.input_ids.tolist(), s.labels.tolist()) for found in one.render(rows) for s in found]


def prepared(file: str, out: Path) -> set[int]:
    """Prepare a file; returns the rows that are rejected."""
    names = column_names(file)
    rows = list(islice(try_rows([file], Columns((), tuple(names), {})), ROWS))
    made = task("here", None, recognise(names, rows[0][1], Layout("")))
    is_json = file.endswith(".jsonl")
    converted = []
    rejected = set()
    for index, (_, row) in enumerate(rows):
        try:
            converted.append(made.convert(row, Origin("here", "train", index, is_json)))
        except RejectedRow:
            rejected.add(index)
    pq.write_table(pa.Table.from_pylist(converted, CHAT_SCHEMA), out)
    return rejected


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout")
@pytest.mark.parametrize(
    "name", ["bfcl_toolcall", "gsm8k", "lf_glaive_toolcall_en", "lf_reason_tool_use", "taskmaster4"]
)
def test_the_samples_of_shared_data(name: str, tmp_path: Path) -> None:
    source = str(SHARED / "data" / name / "messages" / "train.parquet")
    rejected = prepared(source, tmp_path / "made.parquet")
    assert len(rejected) < ROWS // 4
    assert samples(str(tmp_path / "made.parquet")) == samples(source, rejected)


def test_masks_thinking_and_nulls(tmp_path: Path) -> None:
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"a": "b", "c": None}}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": " be kind "},
        {"role": "user", "content": "\tone?\n"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "two\n", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "    two\n", "reasoning_content": " hm "},
    ]
    rows = [
        {"messages": messages, "tools": [{"name": "f", "default": None}], "enable_thinking": False, "train": True},
        {"messages": messages, "train": False, "chat_template_kwargs": {"effort": 3}},
    ]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepared(str(source), tmp_path / "made.parquet") == set()
    made = samples(str(tmp_path / "made.parquet"))
    assert made == samples(str(source))
    assert len(made) == 2
