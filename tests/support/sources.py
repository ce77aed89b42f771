"""Small data sets in the columns of the real ones, for `apollo-sft prepare`."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def gsm8k_rows(count: int, start: int) -> list[dict[str, Any]]:
    return [
        {"question": f"Ann has {i} pens and buys {i} more. How many?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i:,}"}
        for i in range(start, start + count)
    ]


def math_rows(count: int, start: int) -> list[dict[str, Any]]:
    return [
        {"problem": f"What is ${i}/2$?", "level": "1", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$."}
        for i in range(start, start + count)
    ]


def tool_rows(count: int, start: int) -> list[dict[str, Any]]:
    text = "We add.\n```python\nprint({0} + 1)\n```\n```output\nPRINTED {1}\n```\nThe answer is $\\boxed{{{1}}}$."
    return [
        {"problem": f"What is {i} + 1?", "solution": text.format(i, i + 1), "messages": None}
        for i in range(start, start + count)
    ]


def chat_rows(count: int, start: int) -> list[dict[str, Any]]:
    return [
        {"conversations": [{"from": "human", "value": f"Is {i} even?"}, {"from": "gpt", "value": str(i % 2 == 0)}]}
        for i in range(start, start + count)
    ]


STAND_INS = {"gsm8k": gsm8k_rows, "math": math_rows, "tool": tool_rows, "chat": chat_rows}


def write_sources(folder: Path) -> Path:
    """`folder/NAME/{train,test}.jsonl`: 300 and 20 rows of each of STAND_INS."""
    for name, make in STAND_INS.items():
        (folder / name).mkdir()
        for split, count, start in (("train", 300, 0), ("test", 20, 300)):
            rows = "\n".join(json.dumps(row) for row in make(count, start))
            (folder / name / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return folder


def read(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows
