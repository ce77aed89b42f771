"""Rows from a class of the user's: the example of the docs, ready samples, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import SampleStore, StoreRequest, prepare_store
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX
from tests.support.data import data_config, tiny_tokenizer, write_parquet

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "data_formats.md"
SAMPLES = """
import numpy as np
from apollo_sft.types import RowRef, Sample

class Rows:
    def __init__(self, files, tokenizer, data):
        pass

    def __iter__(self):
        ids = np.arange(5, dtype=np.int32)
        yield Sample(ids, np.array(LABELS, dtype=np.int32), RowRef("made up", 7), ())
"""
YIELDS = """
from apollo_sft.types import Conversation, RowRef

class Rows:
    def __init__(self, files, tokenizer, data):
        pass

    def __iter__(self):
        yield ROW
"""


def prepared(tmp_path: Path, code: str, file: str, **changes: Any) -> SampleStore:
    path = tmp_path / "rows.py"
    path.write_text(code)
    data = data_config(store_dir=str(tmp_path / "store"), **changes)
    data = data.model_copy(
        update={"custom_cls": data.custom_cls.model_copy(update={"path": str(path), "name": "Rows"})}
    )
    tokenizer = tiny_tokenizer()
    request = StoreRequest("train", (file,), -1, tokenizer, resolve_template(tokenizer, data), data)
    return prepare_store(request, lambda _: None)


@pytest.fixture
def lines(tmp_path: Path) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "one", "a": "two"}\n{"q": "three", "a": "four"}\n')
    return str(path)


def test_the_example_of_the_docs(tmp_path: Path, lines: str) -> None:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    store = prepared(tmp_path, code, lines)
    rows = [{"question": "one", "answer": "two"}, {"question": "three", "answer": "four"}]
    file = write_parquet(tmp_path / "a.parquet", rows)
    data = data_config(store_dir=str(tmp_path / "store"))
    tokenizer = tiny_tokenizer()
    same = prepare_store(
        StoreRequest("train", (file,), -1, tokenizer, resolve_template(tokenizer, data), data), lambda _: None
    )
    assert [store[i].labels.tolist() for i in range(2)] == [same[i].labels.tolist() for i in range(2)]
    assert [str(store.ref(i)) for i in range(2)] == [f"{lines} row 0", f"{lines} row 1"]
    assert prepared(tmp_path, code + "\n", lines).key != store.key


def test_ready_samples_are_kept_as_they_are(tmp_path: Path, lines: str) -> None:
    x = IGNORE_INDEX
    store = prepared(tmp_path, SAMPLES.replace("LABELS", f"[1, {x}, 3, 4, {x}]"), lines)
    assert (store[0].input_ids.tolist(), store[0].labels.tolist()) == ([0, 1, 2, 3, 4], [1, x, 3, 4, x])
    assert (str(store.ref(0)), store.summary.num_targets) == ("made up row 7", 3)
    cut = prepared(tmp_path, SAMPLES.replace("LABELS", f"[1, {x}, 3, 4, {x}]"), lines, max_length=3, truncation="right")
    assert [(entry.file, entry.tokens_lost) for entry in cut.rejected()] == [("made up", 2)]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (SAMPLES.replace("LABELS", "[0, 1, 2, 3, 4]"), "made up row 7: labels are not the tokens that follow"),
        (SAMPLES.replace("LABELS", "[1, 2]"), "made up row 7: input_ids and labels must be 1-D arrays of equal length"),
        (SAMPLES.replace("np.int32)", "np.int64)").replace("LABELS", "[1]"), "must be int32 arrays"),
        (YIELDS.replace("ROW", "{'role': 'user'}"), "yields an object that is no row (number 0)"),
        (YIELDS.replace("ROW", "1 / 0"), "ZeroDivisionError: division by zero"),
        (YIELDS.replace("ROW", "Conversation([{}], None, {}, RowRef('x', 3))"), "x row 3, column messages, message 0"),
        ("class Other: pass", "has no class 'Rows'"),
        ("class Rows(", "SyntaxError"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path: Path, lines: str, code: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, code, lines)
    assert said in str(caught.value)
