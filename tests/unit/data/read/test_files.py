"""Where data lie: URLs, folders, globs, kinds of files; the same rows from each of them."""

import datetime
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import HfFileSystem

from apollo_sft.data.read import json_lines
from apollo_sft.data.read.files import Columns, expand_paths, stamp
from apollo_sft.data.read.remote import filesystem, remote_hash
from apollo_sft.data.read.rows import column_names, num_rows, read_rows, try_rows
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.fingerprint import content_hash
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.errors import DataError
from apollo_sft.redact import redact
from tests.support.data import data_config, tiny_tokenizer
from tests.support.stores import Store

KEY = "data.train_files"
QA = Columns(required=("q", "a"), optional=("tools",), keys={"q": "data.prompt_key", "a": "data.response_key"})
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}]
COUNT = 1300


def rows(number: int = COUNT) -> list[dict[str, Any]]:
    """More than one batch; nested; not ASCII."""
    return [{"q": f"q{i} ä", "a": [{"role": "x", "content": f"a{i}"}], "tools": TOOLS, "b": i} for i in range(number)]


def lines(given: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in given)


def table(given: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(given)


def write_stream(path: Path, given: list[dict[str, Any]]) -> None:
    with pa.ipc.new_stream(path, table(given).schema) as writer:
        writer.write_table(table(given), max_chunksize=400)


def write(folder: Path, name: str, given: list[dict[str, Any]]) -> str:
    path, content = folder / name, lines(given)
    if name.endswith(".parquet"):
        pq.write_table(table(given), path, row_group_size=300)
    elif name.endswith(".arrow"):
        write_stream(path, given)
    elif name.endswith(".feather"):
        with pa.ipc.new_file(path, table(given).schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table(given), max_chunksize=400)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif name.endswith(".zst"):
        path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    else:
        path.write_bytes(content)
    return str(path)


ALL_KINDS = ["x.parquet", "x.jsonl", "x.ndjson", "x.json", "x.jsonl.gz", "x.jsonl.zst", "x.arrow", "x.feather"]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.mark.parametrize("name", ALL_KINDS)
@pytest.mark.parametrize("remote", [False, True])
def test_every_kind_of_file_gives_the_same_rows(
    name: str, remote: bool, tmp_path: Path, memory: MemoryFileSystem
) -> None:
    file = write(tmp_path, name, rows())
    if remote:
        memory.put_file(file, f"/data/{name}")
        file = f"memory://data/{name}"
    files = expand_paths([file], KEY)
    assert [(ref.file, ref.row) for ref, _ in read_rows(files, QA)] == [(file, i) for i in range(COUNT)]
    assert [row for _, row in read_rows(files, QA)] == [{k: row[k] for k in ("q", "a", "tools")} for row in rows()]
    assert num_rows(files) == COUNT
    assert column_names(file) == ["q", "a", "tools", "b"]


@pytest.mark.parametrize("name", ALL_KINDS)
def test_rows_are_read_from_any_one_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "INDEX_ROWS", 128)
    files = [write(tmp_path, f"{i}-{name}", rows()[i::2]) for i in range(2)]
    whole = list(try_rows(files, QA))
    for first in (0, 1, 299, 300, 400, 649, 650, 651, 900, COUNT - 1, COUNT, COUNT + 5):
        for number in (0, 1, 350):
            assert list(try_rows(files, QA, number, first)) == whole[first : first + number]


def test_rows_from_any_one_on_are_not_read_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "INDEX_ROWS", 100)
    file, seen = write(tmp_path, "x.jsonl", rows()), []
    num_rows([file])
    real = json_lines._all_lines

    def counted(*where: Any) -> Iterator[Any]:
        for one in real(*where):
            seen.append(one)
            yield one

    monkeypatch.setattr(json_lines, "_all_lines", counted)
    assert next(try_rows([file], QA, 1, 1250))[1]["q"] == "q1250 ä"  # type: ignore[index]
    assert len(seen) <= 51


def test_a_file_that_was_written_again_is_counted_again(tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", rows(5))
    assert num_rows([file]) == 5
    write(tmp_path, "x.jsonl", rows(7))
    assert num_rows([file]) == 7


def test_folders_and_globs_on_a_store(tmp_path: Path, memory: MemoryFileSystem) -> None:
    for name in ("b.parquet", "a.parquet", "deep/c.parquet", ".hidden/d.parquet", "readme.md"):
        memory.pipe(f"/data/{name}", Path(write(tmp_path, "x.parquet", rows(2))).read_bytes())
    local = write(tmp_path, "y.jsonl", rows(3))
    every = [f"memory://data/{name}" for name in ("a.parquet", "b.parquet", "deep/c.parquet")]
    assert expand_paths(["memory://data"], KEY) == every
    assert expand_paths(["memory://data/"], KEY) == every
    assert expand_paths(["memory://data/*.parquet", local], KEY) == [*every[:2], local]
    assert expand_paths([f"file://{local}"], KEY) == [local]
    assert num_rows(expand_paths(["memory://data/*.parquet", local], KEY)) == 7
    with pytest.raises(DataError, match=r"did you mean memory://data/a\.parquet"):
        expand_paths(["memory://data/aa.parquet"], KEY)
    with pytest.raises(DataError, match="no such file"):
        expand_paths(["memory://data/*.arrow"], KEY)


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", rows(1))
    write(tmp_path, "b.jsonl", rows(1))
    with pytest.raises(DataError, match=r"several kinds(?s:.*)1 JSON lines, 1 parquet"):
        expand_paths([str(tmp_path)], KEY)
    assert len(expand_paths([str(tmp_path / "*.jsonl")], KEY)) == 1


def test_what_the_library_datasets_has_saved(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_list(rows(50))
    DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk(tmp_path / "all")
    with pytest.raises(DataError, match="several splits"):
        expand_paths([str(tmp_path / "all")], KEY)
    (tmp_path / "all" / "train" / "cache-01.arrow").write_bytes(b"of a map")
    files = expand_paths([str(tmp_path / "all" / "train")], KEY)
    assert [row["q"] for _, row in read_rows(files, QA)] == [row["q"] for row in rows(50)]


class Hub(Store):
    """Stands in for the hub, which cannot be reached here: the paths of huggingface_hub's file system."""

    protocol = "hf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]


@pytest.fixture
def hub() -> Iterator[Hub]:
    fsspec.register_implementation("hf", Hub, clobber=True)
    yield Hub()
    Hub.store.clear()
    fsspec.register_implementation("hf", HfFileSystem, clobber=True)


def test_a_data_set_of_the_hub_gives_its_split(hub: Hub, tmp_path: Path) -> None:
    content = Path(write(tmp_path, "x.parquet", rows(2))).read_bytes()
    names = ["data/train-00001-of-00002", "data/train-00000-of-00002", "data/test-00000-of-00001"]
    for name in names:
        hub.pipe(f"datasets/me/math/{name}.parquet", content)
    hub.pipe("datasets/me/math/README.md", b"what it is")
    start = "hf://datasets/me/math/"
    assert expand_paths(["me/math"], KEY) == [f"{start}{name}.parquet" for name in sorted(names[:2])]
    assert expand_paths(["me/math"], "data.val_files") == [f"{start}{names[2]}.parquet"]
    assert expand_paths([f"{start}data/test*"], KEY) == [f"{start}{names[2]}.parquet"]
    assert num_rows(expand_paths(["me/math"], KEY)) == 4
    hub.pipe("datasets/me/math/socratic/train-0.parquet", content)
    with pytest.raises(DataError, match=r"several folders(?s:.*)data, socratic"):
        expand_paths(["me/math"], KEY)
    hub.pipe("datasets/me/other/a.parquet", content)
    with pytest.raises(DataError, match="no files of the split train"):
        expand_paths(["me/other"], KEY)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no data set of the hub that can be reached(?s:.*)nobody/nothing: "):
        expand_paths(["nobody/nothing"], KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"data.train_files: no such file\n"):
        expand_paths(["data/train"], KEY)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/a.parquet", r"pip install 'apollo-sft\[s3\]'"),
        ("gs://bucket/a.parquet", r"pip install 'apollo-sft\[gcs\]'"),
        ("abfs://box/a.parquet", "adlfs"),
        ("nope://a/b.parquet", "a scheme that fsspec knows"),
        ("hdfs://host:8020/a.parquet", "JAVA_HOME"),
        ("simplecache::s3://a/b.parquet", "a chain of file systems"),
        ("s3://me:canary-of-a-key@bucket/a.parquet", r"s3://\*\*\*@bucket"),
    ],
)
def test_a_scheme_that_cannot_be_used_says_what_to_do(url: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        expand_paths([url], KEY)
    assert str(caught.value).startswith(KEY) and "canary" not in str(caught.value)


class Failing(Store):
    """A store whose connection breaks after some bytes, or that hands out less than it said."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fails_after, raises, read_bytes = 1 << 60, True, 0

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        content = super()._open(path, mode, **kwargs)
        if mode != "rb":
            return content
        owner, read = type(self), content.read

        def limited(size: int = -1) -> bytes:
            if content.tell() >= owner.fails_after:
                if owner.raises:
                    raise ConnectionResetError("the connection was reset by canary-pass:word@peer")
                return b""
            data = read(size)
            owner.read_bytes += len(data)
            return bytes(data)

        content.read = limited
        content.readinto = lambda buffer: _read_into(limited, buffer)
        return content


def _read_into(read: Any, buffer: Any) -> int:
    data = read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Failing]]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(Failing, "fails_after", 1 << 60)
    monkeypatch.setattr(Failing, "raises", True)
    monkeypatch.setattr(Failing, "read_bytes", 0)
    yield Failing
    Failing.store.clear()


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.jsonl.gz", "x.feather", "x.arrow"])
def test_a_read_that_fails_midway_is_not_the_end(
    name: str, raises: bool, tmp_path: Path, failing: type[Failing]
) -> None:
    noise = np.random.default_rng(0)
    given = [row | {"q": noise.bytes(1000).hex()} for row in rows()]
    content = Path(write(tmp_path, name, given)).read_bytes()
    failing().pipe(f"/{name}", content)
    files = expand_paths([f"failing://{name}"], KEY)
    read = try_rows(files, QA)
    next(read)
    failing.fails_after, failing.raises = len(content) // 2, raises
    with pytest.raises(DataError, match=f"failing://{name}: (the file cannot be read|not a readable)"):
        list(read) if name != "x.feather" else list(try_rows(files, QA))


def test_a_column_of_a_store_is_read_alone_and_in_pieces(tmp_path: Path, failing: type[Failing]) -> None:
    file = tmp_path / "x.parquet"
    noise = [bytes([i % 251]) * 10 + i.to_bytes(4, "big") * 2000 for i in range(2000)]
    wide = pa.table({"q": [f"q{i}" for i in range(2000)], "a": [f"a{i}" for i in range(2000)], "image": noise})
    pq.write_table(wide, file, row_group_size=200, compression="none")
    failing().pipe("/x.parquet", file.read_bytes())
    assert len(list(read_rows(["failing://x.parquet"], QA))) == 2000
    assert failing.read_bytes < file.stat().st_size / 10


def test_the_fingerprint_of_a_store_is_of_the_content(tmp_path: Path, memory: MemoryFileSystem) -> None:
    memory.pipe("/a.jsonl", b"{}\n")
    first = content_hash("memory://a.jsonl", tmp_path)
    assert content_hash("memory://a.jsonl", tmp_path) == first
    memory.pipe("/a.jsonl", b"[]\n")
    assert content_hash("memory://a.jsonl", tmp_path) != first


class Guarded(Store):
    """A URL with credentials in it, and with a signature after it."""

    protocol = "guarded"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("me:canary-1@host", "").partition("?")[0])


def test_no_secret_of_a_url_is_in_a_store(tmp_path: Path) -> None:
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    bad = [{"question": "x", "answer": None}]
    Guarded().pipe("/a.jsonl", lines([{"question": "x", "answer": "y"}] * 3 + bad))
    url = "guarded://me:canary-1@host/a.jsonl?X-Signature=canary-2"
    tokenizer = tiny_tokenizer()
    data = data_config(store_dir=str(tmp_path), bad_rows="skip", max_bad_ratio=0.5)
    request = StoreRequest("train", [url], -1, tokenizer, resolve_template(tokenizer, data), data)
    said: list[str] = []
    store = prepare_store(request, said.append)
    assert (len(store), store.summary.num_rows) == (3, 4)
    assert store.ref(0).file == store.summary.files[0] == "guarded://***@host/a.jsonl?X-Signature=***"
    assert len(store.summary.files) == 1
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"canary" not in held and "canary" not in "".join(map(redact, said))


class Etags(Store):
    protocol = "etags"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    says: ClassVar[dict[str, Any]] = {}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found = super().info(path, **kwargs)
        return {"name": path, "size": found["size"], "type": found["type"]} | self.says


def test_a_checksum_of_the_store_comes_before_its_times_and_the_content_last() -> None:
    fsspec.register_implementation("etags", Etags, clobber=True)
    Etags().pipe("/a", b"one")
    Etags.says = {"ETag": "x", "LastModified": datetime.datetime(2026, 1, 1)}
    assert stamp("etags://a") == "3|ETag=x"
    Etags.says = {"LastModified": datetime.datetime(2026, 1, 1)}
    dated = remote_hash("etags://a")
    Etags.says = {"LastModified": datetime.datetime(2026, 1, 2)}
    assert remote_hash("etags://a") != dated
    Etags.says = {}
    assert stamp("etags://a") is None
    of_one = remote_hash("etags://a")
    Etags().pipe("/a", b"two")
    assert remote_hash("etags://a") != of_one
    Etags().pipe("/a", b"one")
    assert remote_hash("etags://a") == of_one
    assert filesystem("etags://a", KEY)[1] == "/a"
