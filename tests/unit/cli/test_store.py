"""`apollo-sft store`: what it lists, what it removes, and what it never removes."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.cli.main import main
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import BUILDING, SampleStore, StoreRequest, key_lock, prepare_store
from apollo_sft.data.store.store_files import LAST_USED
from tests.support.data import data_config, tiny_tokenizer, write_parquet

DAY = 86400


def prepare(folder: Path, rows: int) -> SampleStore:
    file = write_parquet(
        folder / f"{rows}.parquet", [{"question": f"what is {i}", "answer": "four"} for i in range(rows)]
    )
    tokenizer = tiny_tokenizer()
    data = data_config(store_dir=str(folder / "store"))
    request = StoreRequest("train", (file,), -1, tokenizer, resolve_template(tokenizer, data), data)
    return prepare_store(request, lambda _: None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["store", *arguments])
    written = capsys.readouterr()
    return code, written.out, written.err


def listed(capsys: pytest.CaptureFixture[str], root: Path) -> list[dict[str, Any]]:
    code, out, _ = run(capsys, "list", "--json", "--dir", str(root))
    assert code == 0
    stores: list[dict[str, Any]] = json.loads(out)["stores"]
    return stores


def age(folder: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(folder / LAST_USED, (then, then))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two stores of 3 and 40 rows, the first of them old, and what a killed build and a refused one left."""
    old = prepare(tmp_path, 3).folder
    age(old, 40)
    new = prepare(tmp_path, 40).folder
    left = new.parent / f"{BUILDING}{'ab' * 16}-12345678"
    left.mkdir()
    (left / "input_ids.npy").write_bytes(b"x" * 100_000)
    (new.parent / f"{'cd' * 16}.error").write_text("it is bad")
    return tmp_path / "store"


def test_list_shows_every_store_and_what_is_left(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--dir", str(root))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["key", "rows", "samples", "tokens", "size", "made", "used", "files"]
    by_rows = {line[1]: line for line in lines[1:] if line}
    assert by_rows["40"][-1] == str(root.parent / "40.parquet")
    assert by_rows["40"][2] == "40" and by_rows["40"][-3:-1] == ["just", "now"]
    assert by_rows["3"][-4:-1] == ["40", "d", "ago"]
    assert f"unfinished: {BUILDING}{'ab' * 16}-12345678" in out
    assert out.splitlines()[-1].startswith("4 entries, ")
    found = {entry["rows"]: entry for entry in listed(capsys, root) if entry["state"] == "whole"}
    for rows, entry in found.items():
        store = SampleStore(root / entry["key"])
        assert (entry["rows"], entry["samples"], entry["tokens"]) == (rows, len(store), store.summary.num_tokens)
        assert entry["num_bytes"] >= sum(path.stat().st_size for path in store.folder.iterdir())
        assert entry["in_use"] is False
    assert set(found) == {3, 40}
    assert run(capsys, "list", "--dir", str(root / "nowhere"))[1] == f"no store in {root / 'nowhere'}\n"


def test_opening_a_store_is_its_last_use(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [old] = [entry for entry in listed(capsys, root) if entry["rows"] == 3]
    assert time.time() - old["used"] > 39 * DAY
    prepare(root.parent, 3)
    [old] = [entry for entry in listed(capsys, root) if entry["rows"] == 3]
    assert time.time() - old["used"] < DAY


def test_prune_removes_what_is_asked_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> list[int]:
        return sorted(entry["rows"] for entry in listed(capsys, root))

    assert rows() == [0, 0, 3, 40]
    code, out, _ = run(capsys, "prune", "--older-than", "30d", "--dir", str(root), "--dry-run")
    assert code == 0 and "would remove" in out and "3.parquet" in out and "would be free" in out
    assert rows() == [0, 0, 3, 40]
    code, out, _ = run(capsys, "prune", "--older-than", "30d", "--dir", str(root))
    assert code == 0 and "removed" in out
    assert rows() == [0, 0, 40]
    run(capsys, "prune", "--unfinished", "--dir", str(root))
    assert rows() == [40]
    [key] = [entry["key"] for entry in listed(capsys, root)]
    run(capsys, "prune", key[:8], "--dir", str(root))
    assert rows() == []
    assert len(prepare(root.parent, 40)) == 40, "it is made again"
    run(capsys, "prune", "--all", "--dir", str(root))
    assert rows() == [] and not list((root / "hashes").glob("*"))


def test_what_is_open_or_being_built_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = prepare(root.parent, 40)
    building = key_lock(root / ("ab" * 16))
    with building:
        entries = {entry["rows"]: entry for entry in listed(capsys, root) if entry["in_use"]}
        assert set(entries) == {0, 40} and entries[0]["state"] == "being built"
        _, out, _ = run(capsys, "prune", "--all", "--dir", str(root))
        assert f"kept {store.key[:12]} ({root.parent / '40.parquet'}): a process uses it" in out
        assert "being built: a process builds it" in out
    assert sorted(entry["rows"] for entry in listed(capsys, root)) == [0, 40]
    assert store[39].ref.row == 39
    del store
    _, out, _ = run(capsys, "prune", "--all", "--dir", str(root))
    assert "kept" not in out
    assert listed(capsys, root) == []


def test_a_damaged_store_is_shown_and_removed_as_unfinished(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [key] = [entry["key"] for entry in listed(capsys, root) if entry["rows"] == 40]
    (root / key / "meta.json").write_text("{")
    assert [entry["state"] for entry in listed(capsys, root) if entry["key"] == key] == ["damaged"]
    run(capsys, "prune", "--unfinished", "--dir", str(root))
    assert [entry["rows"] for entry in listed(capsys, root)] == [3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune"], "needs to know what to remove"),
        (["prune", "--older-than", "30"], "such as 30d"),
        (["prune", "abcdefff"], "abcdefff names no store"),
        (["prune", "ab"], "ab names no store"),
        (["list", "--all"], "apollo-sft store prune removes some"),
        (["show"], "invalid choice: 'show'"),
        ([], "required: what"),
    ],
)
def test_mistakes_are_refused(root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = run(capsys, *arguments, "--dir", str(root))
    assert (code, out) == (2, "") and said in err
    assert len(listed(capsys, root)) == 4
