"""data.bad_rows=skip: what is left out is counted by reason, and too much of it is refused."""

from pathlib import Path
from typing import Any

import pytest

from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.bad_rows import MOST_REASONS, OTHER, count_bad, without_rare
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.data.store.store_files import StoreSummary
from apollo_sft.errors import DataError
from tests.support.data import data_config, tiny_tokenizer, write_parquet


def request(folder: Path, file: str, **changes: Any) -> StoreRequest:
    tokenizer = tiny_tokenizer()
    data = data_config(**({"store_dir": str(folder), "bad_rows": "skip"} | changes))
    return StoreRequest("train", (file,), -1, tokenizer, resolve_template(tokenizer, data), data)


def hundred_rows(folder: Path, *bad: int) -> str:
    rows: list[dict[str, Any]] = [{"question": f"what is {i}", "answer": "four"} for i in range(100)]
    for i in bad:
        rows[i]["answer"] = None
    return write_parquet(folder / "a.parquet", rows)


def test_bad_rows_up_to_the_ratio_are_left_out_and_counted(tmp_path: Path) -> None:
    file = hundred_rows(tmp_path, 3, 50, 51, 52, 99)
    store = prepare_store(request(tmp_path / "store", file, max_bad_ratio=0.05), lambda _: None)
    summary = store.summary
    assert (len(store), summary.num_rows, summary.rows_bad, summary.not_trained.count) == (95, 100, 5, 5)
    [(reason, rows)] = summary.bad.items()
    assert (reason, rows.tally.count) == ("column answer: the cell is null", 5)
    assert rows.tally.examples == [f"{file} row {i}" for i in (3, 50, 51, 52, 99)]
    assert [entry.row for entry in store.rejected()] == [3, 50, 51, 52, 99]


def test_above_the_ratio_all_is_refused_also_when_the_store_is_there(tmp_path: Path) -> None:
    file = hundred_rows(tmp_path, 3, 50, 51, 52, 98, 99)
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            prepare_store(request(tmp_path / "store", file, max_bad_ratio=0.05), said.append)
        text = str(caught.value)
        assert "data.train_files: 6 of 100 rows cannot be used (6.00%), too many" in text
        assert "6 x column answer: the cell is null" in text
        assert f"first {file} row 3, {file} row 50, {file} row 51, {file} row 52, {file} row 98" in text
        assert "at most 0.05 of all rows (data.max_bad_ratio)" in text
    built = sum("train rows in" in line for line in said)
    store = prepare_store(request(tmp_path / "store", file, max_bad_ratio=0.06), said.append)
    assert (len(store), built, sum("train rows in" in line for line in said)) == (94, 1, 1), "it is the same store"
    with pytest.raises(DataError, match="at most 0 of all rows"):
        prepare_store(request(tmp_path / "store", file, max_bad_ratio=0.0), said.append)


def test_rows_that_are_all_bad_say_why_and_not_that_there_is_no_target(tmp_path: Path) -> None:
    file = hundred_rows(tmp_path, *range(100))
    with pytest.raises(DataError, match=r"100 of 100 rows cannot be used \(100.00%\), too many"):
        prepare_store(request(tmp_path / "store", file), lambda _: None)
    with pytest.raises(DataError, match="no row has a token to train on"):
        prepare_store(request(tmp_path / "store", file, max_bad_ratio=1.0), lambda _: None)


def test_reasons_that_differ_in_numbers_are_one(tmp_path: Path) -> None:
    summary = StoreSummary(files=["f"])
    for i, text in enumerate(["12 words are too many", "3,000 words are too many", "the text is not UTF-8"]):
        count_bad(summary, f"f row {i}", DataError(f"f row {i}: {text}", found=f"word {i}"))
    counts = {reason: rows.tally.count for reason, rows in summary.bad.items()}
    assert counts == {"… words are too many": 2, "the text is not UTF-8": 1}
    assert summary.bad["… words are too many"].text == "f row 0: 12 words are too many\n  found:    word 0"


def test_a_file_of_nothing_but_different_mistakes_does_not_fill_memory() -> None:
    total = StoreSummary(files=["f"])
    for chunk in range(20):
        summary = StoreSummary(files=[])
        for i in range(10):
            letters = "".join(chr(97 + int(digit)) for digit in str(chunk * 10 + i))
            count_bad(summary, f"f row {chunk * 10 + i}", DataError(f"f row {chunk * 10 + i}: no {letters}"))
        total.add(summary)
        without_rare(total)
    assert total.rows_bad == 200
    assert len(total.bad) == MOST_REASONS + 1
    assert total.bad[OTHER].tally.count == 200 - MOST_REASONS
    assert total.bad[OTHER].tally.examples == [f"f row {i}" for i in range(50, 55)]


def test_rows_that_a_template_refuses_are_grouped_by_its_own_words(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('never say ' + m.role + ' no') }}"
        "{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    rows = [
        {"question": text, "answer": answer} for text, answer in (("a", "no"), ("no", "b"), ("no", "c"), ("a", "b"))
    ]
    file = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError) as caught:
        prepare_store(request(tmp_path / "store", file, bad_rows="error", chat_template=template), lambda _: None)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    why = "the chat template fails on this conversation, TemplateError: never say"
    assert lines[1] == f"found: 2 x {why} user no"
    assert lines[2] == f"first {file} row 1, {file} row 2"
    assert lines[3] == "to do: change the row, or data.chat_template"
    assert lines[4] == f"1 x {why} assistant no"
