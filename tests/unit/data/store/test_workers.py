"""A store made by several processes: bit for bit that of one, and what becomes of it when one of them is killed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.build import ROWS_OF_A_PROCESS, duration, num_cores, num_processes, progress, shards
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.data.store.tokenise import CHUNK_ROWS, Stretch
from apollo_sft.errors import ApolloError, DataError
from tests.support.data import chat, data_config, tiny_tokenizer, write_parquet
from tests.support.processes import descendants, wait_until_gone

TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def request(folder: Path, paths: tuple[str, ...], processes: int, **changes: Any) -> StoreRequest:
    tokenizer = tiny_tokenizer()
    data = data_config(True, store_dir=str(folder), chat_template=TOOLS, **changes)
    return StoreRequest("train", paths, -1, tokenizer, resolve_template(tokenizer, data), data, processes)


def conversation(i: int) -> dict[str, Any]:
    """Of every kind: with calls, too long, bad in one of several ways, without a target."""
    turns: list[dict[str, Any]] = chat(f"what is {i}", "four " * (i % 7 + 1), "and then", "five " * (i % 3))
    if i % 11 == 3:
        turns[1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": f'{{"a": {i}}}'}}]
    if i % 307 == 5:
        turns[1]["content"] = "x" * 90
    if i % 101 == 7:
        turns[1]["role"] = ""
    if i % 1009 == 9:
        turns.append(turns[0])
    if i % 509 == 8:
        turns[0]["content"] = "y" * 90
    return {"messages": turns}


def write(folder: Path, number: int) -> tuple[str, ...]:
    half = number // 3
    rows = [conversation(i) for i in range(number)]
    return write_parquet(folder / "a.parquet", rows[:half]), write_parquet(folder / "b.parquet", rows[half:])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHANGES: dict[str, Any] = {"bad_rows": "skip", "max_length": 80, "truncation": "right"}


def test_the_store_does_not_tell_how_many_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollo_sft.data.store.build.FEWEST_ROWS", CHUNK_ROWS)  # six shards of few rows
    files = write(tmp_path, 3000)
    stores, said = [], []
    for processes in (1, 3):
        told: list[str] = []
        stores.append(prepare_store(request(tmp_path / str(processes), files, processes, **CHANGES), told.append))
        said.append(told)
    one, three = stores
    assert contents(one.folder) == contents(three.folder)
    summary = one.summary
    assert min(summary.rows_bad, summary.samples_truncated, summary.not_trained.count, summary.num_turns) > 0
    assert summary.num_rows == 3000 and summary.rows_bad > 20
    assert [sum(counts) for counts in zip(*summary.stop_tokens.items(), strict=True)][1] <= summary.num_turns
    assert all("has no role" in told[0] for told in said)
    beside = [{path.name for path in store.folder.parent.iterdir()} - {"hashes"} for store in stores]  # of old files
    assert beside[0] == beside[1]


@pytest.mark.long
def test_two_and_four_processes_make_the_same_store(tmp_path: Path) -> None:
    files = write(tmp_path, 20_000)
    found = [
        contents(prepare_store(request(tmp_path / str(n), files, n, **CHANGES), lambda _: None).folder)
        for n in (1, 2, 4)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.long
def test_all_processes_find_the_same_bad_rows(tmp_path: Path) -> None:
    """Refused only when all rows are seen."""
    files = write(tmp_path, 9000)
    said = []
    for processes in (1, 2):
        with pytest.raises(DataError) as caught:
            prepare_store(request(tmp_path / str(processes), files, processes, max_length=80), lambda _: None)
        said.append(str(caught.value))
        assert not list((tmp_path / str(processes)).glob(".building*"))
    assert said[0] == said[1]
    assert "of 9,000 rows cannot be used" in said[0]


@contextmanager
def no_process_left() -> Iterator[None]:
    before = set(descendants(os.getpid()))
    yield
    started = [pid for pid in descendants(os.getpid()) if pid not in before]
    assert not wait_until_gone(started, 5)


def test_a_killed_worker_is_an_error_that_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two shards, each of so many chunks that both workers are still busy when the first bad row is reported.
    monkeypatch.setattr("apollo_sft.data.store.build.FEWEST_ROWS", 6 * CHUNK_ROWS)
    files = write(tmp_path, 6000)
    before = set(descendants(os.getpid()))

    def kill_one(_: str) -> None:
        """Called as soon as a bad row is met."""
        workers = [pid for pid in descendants(os.getpid()) if pid not in before]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)

    wanted = request(tmp_path / "store", files, 2, **CHANGES)
    with no_process_left(), pytest.raises(ApolloError) as caught:
        prepare_store(wanted, kill_one)
    assert "signal SIGKILL, as the system sends it when memory runs out" in str(caught.value)
    left = [path.name for path in (tmp_path / "store").iterdir() if path.suffix != ".lock" and path.name != "hashes"]
    assert left == []
    again = prepare_store(replace(wanted, processes=1), lambda _: None)
    assert again.summary.num_rows == 6000


def test_shards_are_all_rows_once_in_whole_chunks() -> None:
    counts = [("a", 700), ("b", 0), ("c", 5000), ("d", 1)]
    for total, size in ((5701, 512), (5701, 513), (5701, 10**6), (600, 1), (512, 512), (0, 512)):
        found = shards(counts, total, size)
        rows = [(s.file, s.first + i) for shard in found for s in shard.stretches for i in range(s.number)]
        assert rows == [(file, i) for file, count in counts for i in range(count)][:total]
        sizes = [sum(stretch.number for stretch in shard.stretches) for shard in found]
        assert all(number % CHUNK_ROWS == 0 for number in sizes[:-1])
        assert [shard.index for shard in found] == list(range(len(found)))
    assert shards(counts, 5701, 1024)[0].stretches == (Stretch("a", 0, 700), Stretch("c", 0, 324))


def test_a_process_for_each_core_where_there_are_rows_for_it(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert [num_processes(rows) for rows in (0, ROWS_OF_A_PROCESS, 2 * ROWS_OF_A_PROCESS - 1)] == [1, 1, 1]
    assert num_processes(10**9) == num_cores() <= cores
    quota = tmp_path / "cpu.max"
    for text, expected in (("max 100000", cores), ("100000 100000", 1), ("50000 100000", 1), ("9900000 100000", cores)):
        quota.write_text(text)
        assert num_cores(quota) == expected
    assert num_cores(tmp_path / "none") == cores


def test_progress_says_how_long_it_takes() -> None:
    said = progress(12_000, 1_000_000, 5100.4)
    assert said == "tokenised 12,000 of 1,000,000 rows, 5,100 rows/s, 3 min left"
    assert progress(12_000, None, 5100.4) == "tokenised 12,000 rows, 5,100 rows/s"
    assert [duration(s) for s in (4.4, 89, 91, 5400, 9000)] == ["4 s", "89 s", "2 min", "1 h 30 min", "2 h 30 min"]


def test_progress_is_said_by_the_one_who_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollo_sft.data.store.build.FIRST_LOG_SECONDS", 0.0)
    said: list[str] = []
    files = write(tmp_path, 3000)
    prepare_store(request(tmp_path / "store", files, 1, **CHANGES), said.append)
    assert any(text.startswith("tokenised 1,024 of 3,000 rows, ") and text.endswith(" left") for text in said)
    before = time.monotonic()
    number = len(said)
    prepare_store(request(tmp_path / "store", files, 1, **CHANGES), said.append)
    assert len(said) == number and time.monotonic() - before < 5
