"""Data sets of a hub: a small one is served here, over HTTP, with the addresses and headers of the real one."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.data import write_parquet

COMMIT, CONVERTED = "a" * 40, "b" * 40
ROWS = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]


class Hub(http.server.ThreadingHTTPServer):
    """`files`: content by commit and name."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.revisions = {"main": COMMIT, "refs/convert/parquet": CONVERTED}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        if path.startswith("/api/datasets/org/set"):
            revision = path.partition("/revision/")[2] or "main"
            commit = self.server.revisions.get(revision)
            if commit is None:
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            listing = [{"rfilename": name} for name in self.server.files[commit]]
            return self.answer(200, json.dumps({"id": "org/set", "sha": commit, "siblings": listing}).encode(), {})
        if path.startswith("/datasets/org/set/resolve/"):
            commit, _, name = path.removeprefix("/datasets/org/set/resolve/").partition("/")
            content = self.server.files[commit][name]
            return self.answer(200, content, {"ETag": f'"{commit}{len(content)}"', "X-Repo-Commit": commit})
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    content = Path(write_parquet(tmp_path / "rows.parquet", ROWS)).read_bytes()
    main = {"README.md": b"# set", "main/train-00000-of-00001.parquet": content, "other/train-0.parquet": content}
    converted = {f"main/{split}/0000.parquet": content for split in ("train", "test")}
    served = Hub({COMMIT: main, CONVERTED: converted})
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def prepare(hub: Hub, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "cache"),
        "HOME": str(folder),
    }
    command = [sys.executable, "-m", "apollo_sft.cli.main", "prepare", "gsm8k", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_split_is_downloaded_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    finished = prepare(hub, tmp_path, "--data_source", "org/set", "--splits", "train")
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "data" / "gsm8k"
    rows = pq.read_table(folder / "train.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["1", "2", "3"]
    assert {row["data_source"] for row in rows} == {"org/set"}
    source = json.loads((folder / "manifest.json").read_text())["source"]
    assert (source["kind"], source["name"], source["revision"]) == ("hub", "org/set", COMMIT)


def test_the_hubs_own_parquet_copy_has_the_splits_that_are_missing(hub: Hub, tmp_path: Path) -> None:
    finished = prepare(hub, tmp_path, "--data_source", "org/set")
    assert finished.returncode == 0, finished.stderr
    manifest = json.loads((tmp_path / "data" / "gsm8k" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == CONVERTED and manifest["prompts_also_in_first_split"] == {"test": 3}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--data_source", "org/gone"], "the data set 'org/gone' cannot be read from the hub"),
        (["--data_source", "org/set", "--revision", "gone"], "the data set 'org/set' cannot be read from the hub"),
        (["--data_source", "org/set", "--splits", "train,validation"], "org/set has no split 'validation'"),
        (["--data_source", "not an id"], "the data set 'not an id' cannot be read from the hub"),
    ],
)
def test_what_the_hub_does_not_have(options: list[str], found: str, hub: Hub, tmp_path: Path) -> None:
    finished = prepare(hub, tmp_path, *options)
    assert finished.returncode == 2 and found in finished.stderr and "Traceback" not in finished.stderr
    assert not (tmp_path / "data").exists()


def test_a_hub_that_cannot_be_reached_names_the_way_out(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    finished = prepare(hub, tmp_path)
    assert finished.returncode == 2
    assert "'openai/gsm8k' cannot be read from the hub" in finished.stderr
    assert "--local_dataset_path FOLDER --data_source openai/gsm8k" in finished.stderr
