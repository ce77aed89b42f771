"""Data from a web server, which this test is itself."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apollo_sft.data.read.files import Columns, expand_paths, stamp
from apollo_sft.data.read.rows import num_rows, read_rows
from apollo_sft.errors import DataError

KEY = "data.train_files"
QA = Columns(("q", "a"), (), {"q": "data.prompt_key", "a": "data.response_key"})
ROWS = [{"q": f"q{i}" * 50, "a": f"a{i}"} for i in range(3000)]
SIGNED = "?X-Signature=canary-of-a-signature"


class Server(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    cut = False

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, with_body: bool = True) -> None:
        content = self.files.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        begin, end = 0, len(content)
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or end) + 1, end)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", "one")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(content[begin : (begin + end) // 2 if self.cut else end])

    def log_message(self, *_: object) -> None:
        """It would write to stderr."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=500)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    files = {"/a.parquet": table.getvalue().to_pybytes(), "/a.jsonl": lines}
    monkeypatch.setattr(Server, "files", files, raising=False)
    monkeypatch.setattr(Server, "cut", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_rows_of_a_web_server(name: str, server: str) -> None:
    files = expand_paths([f"{server}/{name}{SIGNED}"], KEY)
    read = list(read_rows(files, QA))
    assert [row for _, row in read] == ROWS
    assert "canary" not in read[0][0].file
    assert num_rows(files) == len(ROWS)
    assert (stamp(files[0]) or "").endswith("|ETag=one")


def test_what_a_web_server_does_not_have_or_finish(server: str) -> None:
    with pytest.raises(DataError, match=r"no such file(?s:.*)b\.parquet"):
        expand_paths([f"{server}/b.parquet"], KEY)
    Server.cut = True
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=r"cannot be read|not a readable"):
            list(read_rows([f"{server}/{name}"], QA))
    with pytest.raises(DataError, match=r"cannot be reached|no such file"):
        expand_paths(["http://127.0.0.1:9/a.parquet"], KEY)
