"""mlflow, swanlab and trackio, each really written without a network and read back with its own reader.

swanlab's protobuf is older than the pinned one, so it is not among the test tools: the last test installs
it for itself.
"""

import http.server
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.errors import Preempted
from apollo_sft.report.log import setup_logging
from apollo_sft.report.metrics import MetricsWriter, Record, read_metrics
from apollo_sft.report.sinks import RunInfo, Sinks, check_backends
from tests.support import python
from tests.support.interrupted import unfinished
from tests.support.runs import arguments, write_inputs

pytestmark = pytest.mark.long
RECORDS: list[Record] = [
    {"step": 0, "val/loss": 2.5, "val/targets": 40},
    {"step": 10, "train/loss": 1.5, "train/lr": 1e-5},
    {"step": 20, "train/loss": 1.25, "train/lr": 5e-6, "val/loss": 1.75},
]
SECRET = "hf_0123456789abcdefghij"
LOGGERS = ("mlflow", "swanlab", "trackio")
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"needs the extra: pip install 'apollo-sft[{name}]'"
        ),
    )
    for name in LOGGERS
]
Found = dict[tuple[str, int], float]


@pytest.fixture
def info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunInfo:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    if importlib.util.find_spec("trackio"):
        redirect_trackio(tmp_path / "trackio", monkeypatch)
    setup_logging(is_main=True)
    return RunInfo(folder, "my-project", f"exp {SECRET}", {"optim": {"lr": 1e-5}, "data": {"kwargs": {}, "key": "q"}})


def redirect_trackio(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRACKIO_DIR is read once, at the import; a later test of the same process has another folder."""
    import trackio
    from trackio import sqlite_storage, utils

    for module in (trackio, utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder, raising=False)


def run_all(name: str, info: RunInfo, records: list[Record]) -> None:
    opened = Sinks([name], info)
    for record in records:
        opened.log(record)
    opened.close()


def read_back(name: str, info: RunInfo) -> list[Found]:
    """What every run that the backend knows holds: (metric, step) -> value."""
    return {"mlflow": read_mlflow, "swanlab": read_swanlab, "trackio": read_trackio}[name](info)


def mlflow_runs(info: RunInfo) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{info.folder / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(info.project)
    return client, client.search_runs([experiment.experiment_id])


def read_mlflow(info: RunInfo) -> list[Found]:
    client, runs = mlflow_runs(info)
    return [
        {
            (name, metric.step): metric.value
            for name in run.data.metrics
            for metric in client.get_metric_history(run.info.run_id, name)
        }
        for run in runs
    ]


def read_trackio(info: RunInfo) -> list[Found]:
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for run in Api().runs(info.project):
        lines = SQLiteStorage.get_logs(info.project, run.name)
        found.append(
            {
                (name, line["step"]): value
                for line in lines
                for name, value in line.items()
                if "/" in name and isinstance(value, int | float)
            }
        )
    return found


def read_swanlab(info: RunInfo) -> list[Found]:
    """The files of several starts are one run where they have one id."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record as SwanLabRecord
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found: dict[str, Found] = {}
    for path in sorted((info.folder / "swanlab").glob("run-*/run-*.swanlab")):
        reader, run = DataStoreReader(), ""
        reader.open(str(path))
        while (content := reader.scan()) is not None:
            record = SwanLabRecord.FromString(content)
            if record.HasField("start"):
                run = record.start.id
                assert record.start.project == info.project
            if record.HasField("scalar"):
                found.setdefault(run, {})[record.scalar.key, record.scalar.step] = record.scalar.value.number
    return [*found.values()]


def expected(records: list[Record]) -> Found:
    return {
        (name, int(record["step"])): value for record in records for name, value in record.items() if name != "step"
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_read_back_at_its_step_and_nobody_was_asked(
    name: str, info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = []
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: (hosts.append(host), look_up(host, *rest))[1]
    )
    check_backends([name])
    run_all(name, info, RECORDS)
    assert read_back(name, info) == [expected(RECORDS)]
    assert hosts == []


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_run_and_another_folder_is_another(name: str, info: RunInfo) -> None:
    run_all(name, info, RECORDS[:2])
    run_all(name, replace(info, first_step=10, config={"changed": 1}), RECORDS[2:])
    assert read_back(name, info) == [expected(RECORDS)]
    other = replace(info, folder=info.folder.with_name("other"))
    other.folder.mkdir()
    run_all(name, other, RECORDS[:1])
    identities = {(each.folder / name / "run_id").read_text() for each in (info, other)}
    assert len(identities) == 2
    if name == "trackio":  # it has one database for all folders
        assert sorted(len(run) for run in read_back(name, info)) == [len(expected(RECORDS[:1])), len(expected(RECORDS))]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_written_holds_a_secret(name: str, info: RunInfo, tmp_path: Path) -> None:
    run_all(name, info, RECORDS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")
@pytest.mark.parametrize(
    ("reason", "status"), [(None, "FINISHED"), (RuntimeError("no"), "FAILED"), (Preempted("TERM"), "KILLED")]
)
def test_mlflow_is_told_the_configuration_and_how_a_run_ended(
    info: RunInfo, reason: Exception | None, status: str
) -> None:
    def ending() -> None:
        opened = Sinks(["mlflow"], info)
        try:
            if reason is not None:
                raise reason
        finally:
            opened.close()

    with nullcontext() if reason is None else pytest.raises(type(reason)):
        ending()
    _, [run] = mlflow_runs(info)
    assert run.info.status == status
    assert run.data.params == {"optim.lr": "1e-05", "data.kwargs": "{}", "data.key": "q"}
    assert run.info.run_name == "exp ***"


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: the logger")]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_a_database_that_goes_away_is_reported_once_and_costs_no_line(
    info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = MetricsWriter(info.folder / "metrics.jsonl")
    opened = Sinks(["mlflow"], info)
    for step in range(6):
        if step == 2:
            (info.folder / "mlflow" / "mlflow.db").write_bytes(b"no database any more")
        record: Record = {"step": step, "train/loss": 1.0}
        writer.write(record)
        opened.log(record)
    opened.close()
    writer.close()
    assert len(warnings(capsys.readouterr().err)) == 1
    assert [record["step"] for record in read_metrics(info.folder / "metrics.jsonl")] == [*range(6)]


class Gone(http.server.BaseHTTPRequestHandler):
    """A server that is there, and cannot answer."""

    def do_GET(self) -> None:
        self.send_error(503)

    do_POST = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *_: object) -> None: ...


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_a_server_that_does_not_answer_is_left_out(
    info: RunInfo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gone)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{server.server_port}")
    try:
        run_all("mlflow", info, RECORDS)
    finally:
        server.shutdown()
    said = capsys.readouterr().err
    assert len(warnings(said)) == 1
    assert SECRET not in said


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_goes_away_does_not_end_the_run(
    name: str, info: RunInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Sinks([name, "tensorboard"], info)
    opened.log(RECORDS[0])
    folder = tmp_path / "trackio" if name == "trackio" else info.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("nothing can be written here any more")
    for record in RECORDS[1:]:
        opened.log(record)
    opened.close()
    said = capsys.readouterr()
    assert len(warnings(said.err)) <= 1
    assert said.out == "", "stdout is for results"
    assert [event.step for event in tensorboard_events(info)] == [0, 20]


def test_a_training_that_goes_on_from_its_checkpoint_is_one_run(info: RunInfo, tmp_path: Path) -> None:
    """Through the command line, all loggers at once: the run folder with their files is accepted again."""
    names = [name for name in LOGGERS if importlib.util.find_spec(name)]
    inputs, first, again = write_inputs(tmp_path / "inputs"), tmp_path / "first", tmp_path / "again"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    keys = (f"trainer.logger=[{','.join(names)}]", "trainer.total_training_steps=4", "trainer.save_freq=2")
    for out in (first, again):
        if out == again:
            unfinished(first, again, steps=2)
        command = [sys.executable, "-m", "apollo_sft", *arguments(inputs, out, *keys)]
        ended = python.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert warnings(ended.stderr) == []
        assert ended.stdout == ""
    assert [record["step"] for record in read_metrics(again / "metrics.jsonl")] == [1, 2, 3, 4]
    for name in names:
        [run] = read_back(name, replace(info, folder=again, project="gsm8k-sft"))
        assert {step for _, step in run} == {1, 2, 3, 4}, name


def tensorboard_events(info: RunInfo) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(info.folder / "tensorboard")).Reload().Scalars("val/loss")  # type: ignore[no-any-return]


@pytest.mark.skipif(importlib.util.find_spec("swanlab") is not None, reason="the tests above run here")
@pytest.mark.timeout(1800)
def test_swanlab_beside_its_own_protobuf(tmp_path: Path) -> None:
    """Its tests above, in a process that finds swanlab and what it needs before all else."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(tmp_path / "swanlab"),
        "swanlab>=0.10",
    ]
    subprocess.run([*install, "swanlab>=0.10"], check=True, timeout=900)
    root = Path(__file__).resolve().parents[3]
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "long", __file__, "-k", "swanlab"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "swanlab")}
    done = subprocess.run(tests, cwd=root, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:]
    counts = done.stdout.splitlines()[-1]
    assert "passed" in counts and "failed" not in counts, counts
