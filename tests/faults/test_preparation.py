"""Several processes prepare; Ctrl-C comes, or SIGKILL to one of them: the next start makes the same store."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apollo_sft.data.store.build import ROWS_OF_A_PROCESS, num_processes
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import Preempted
from tests.support.data import write_parquet
from tests.support.processes import descendants, kill, ranks, wait_until_gone
from tests.support.reliability import record
from tests.support.runs import TIMEOUT_SECONDS, arguments, rows, status, write_inputs

PATIENCE_SECONDS = 120
ROWS = 2 * ROWS_OF_A_PROCESS + 1000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_parquet(folder / "many.parquet", rows(ROWS))
    return folder


def start(inputs: Path, out: Path, store: Path, processes: int = 1) -> "subprocess.Popen[str]":
    keys = [f"data.train_files={inputs / 'many.parquet'}", "data.val_files=null", f"data.store_dir={store}"]
    words = arguments(inputs, out, "trainer.total_training_steps=1", *keys)
    command = [sys.executable, "-m", "apollo_sft.cli.main", "train", f"--nproc={processes}", *words]
    log = out.with_suffix(".log").open("a")
    # A real command line: the workers are found by theirs, which a forked process does not have.
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)


def said(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def wait_for(reached: Callable[[], bool], process: "subprocess.Popen[str]", out: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert process.poll() is None, said(out)
        assert time.monotonic() < deadline, said(out)
        time.sleep(0.01)


def has_parts(store: Path) -> bool:
    """Whether several processes are writing."""
    return len(list(store.glob(".building-*/part-*"))) > 1


def workers(root: int) -> list[int]:
    """Processes below `root` that tokenise."""
    lines = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(root)}
    return [pid for pid, path in lines.items() if b"apollo_sft.data.store.workers" in path.read_bytes()]


def contents(store: Path) -> dict[str, bytes]:
    """Of the only store in the folder."""
    [folder] = [path for path in store.iterdir() if path.is_dir() and path.name != "hashes"]
    SampleStore(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ctrl_c_while_several_processes_tokenise(inputs: Path, tmp_path: Path) -> None:
    assert num_processes(ROWS) > 1, "this test needs two cores"
    out, store = tmp_path / "out", tmp_path / "store"
    process = start(inputs, out, store)
    wait_for(lambda: has_parts(store), process, out)
    everybody = descendants(process.pid)
    assert len(workers(process.pid)) > 1
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    code = process.wait(timeout=TIMEOUT_SECONDS)
    left = wait_until_gone(everybody, 5)
    kill(left)
    wrong = [] if code == Preempted.exit_code else [f"exit code {code}"]
    wrong += [f"{len(left)} processes lived on"] if left else []
    wrong += ["a traceback"] if "Traceback" in said(out) else []
    wrong += [] if said(out).count("apollo-sft: stopped by SIGINT") == 1 else ["it is not said once"]
    wrong += ["something is left"] if list(store.glob(".building-*")) else []
    wrong += [] if status(out) == "preempted" else [f"run.json says {status(out)}"]
    record(
        "Ctrl-C while several processes tokenise",
        trials=1,
        failures=int(bool(wrong)),
        worst_seconds=time.monotonic() - began,
    )
    assert not wrong, f"{wrong}\n{said(out)[-4000:]}"


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a start that nobody ends makes."""
    folder = tmp_path_factory.mktemp("reference")
    process = start(inputs, folder / "out", folder / "store")
    assert process.wait(timeout=TIMEOUT_SECONDS) == 0, said(folder / "out")
    return contents(folder / "store")


@pytest.mark.long
@pytest.mark.parametrize("who", ["the preparing rank", "a worker", "another rank"])
def test_sigkill_while_preparing_then_the_same_command(
    inputs: Path, tmp_path: Path, reference: dict[str, bytes], who: str
) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    process = start(inputs, out, store, processes=2)
    wait_for(lambda: has_parts(store), process, out)
    below = descendants(process.pid)
    found = ranks(process.pid)
    victim = {"the preparing rank": found[0], "a worker": workers(process.pid)[0], "another rank": found[1]}[who]
    began = time.monotonic()
    kill([victim])
    code = process.wait(timeout=TIMEOUT_SECONDS)
    left = wait_until_gone(below, 10)
    kill(left)
    wrong = [] if code not in (0, Preempted.exit_code) else [f"exit code {code}"]
    wrong += [f"{len(left)} processes lived on"] if left else []
    wrong += [] if who != "a worker" or "signal SIGKILL, as the system sends it" in said(out) else ["it is not said"]
    whole = [path.name for path in store.iterdir() if (path / "meta.json").exists()]
    wrong += [f"a store: {whole}"] if whole else []
    again = start(inputs, out, store, processes=2)
    code = again.wait(timeout=TIMEOUT_SECONDS)
    wrong += [f"again: exit code {code}"] if code else []
    wrong += [] if not code and contents(store) == reference else ["it is another store"]
    seconds = time.monotonic() - began
    name = f"SIGKILL of {who} while several processes tokenise, then again"
    record(name, trials=1, failures=int(bool(wrong)), worst_seconds=seconds)
    assert not wrong, f"{wrong}\n{said(out)[-6000:]}"


@pytest.mark.long
def test_who_waits_takes_over_from_the_one_that_is_killed(
    inputs: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    store, first_out, second_out = tmp_path / "store", tmp_path / "first", tmp_path / "second"
    first = start(inputs, first_out, store)
    wait_for(lambda: has_parts(store), first, first_out)
    for pid in [first.pid, *descendants(first.pid)]:  # or it might be done before the second one asks
        os.kill(pid, signal.SIGSTOP)
    second = start(inputs, second_out, store)
    wait_for(lambda: "another process tokenises the same data" in said(second_out), second, second_out)
    kill([*descendants(first.pid), first.pid])
    first.wait()
    assert second.wait(timeout=TIMEOUT_SECONDS) == 0, said(second_out)
    assert contents(store) == reference
    assert not list(store.glob(".building-*"))
