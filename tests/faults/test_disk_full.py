"""A disk that is full, over quota or read-only at every write of a run: training stops and says so, nothing is lost.

Three ways: the operating system refuses the n-th operation and all later ones (the recorder of file operations raises
what it would); no file may grow beyond a size (`RLIMIT_FSIZE`, a limit of the system); a small disk fills up (tmpfs, if
a test may mount one). After each, the same command with room again finishes bit-equal.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.errors import ApolloError, CheckpointError
from tests.support.file_operations import FileOperations
from tests.support.interrupted import differences, go_on, train_into, whole_steps, write_dropout_inputs
from tests.support.reliability import record

KEYS = ("trainer.total_training_steps=3", "trainer.save_freq=1", "trainer.max_ckpt_to_keep=9", "trainer.test_freq=1")
SYNCHRONOUS = "trainer.checkpoint.async_save=false"
TAKES_NO_ROOM = ("unlink", "rmdir")
COVERING = 37
"""`make test` takes every so many-th write."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dropout_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    train_into(inputs, out, *KEYS)
    return out


@dataclass
class Report:
    trials: int = 0
    worst_seconds: float = 0.0
    bad: list[str] = field(default_factory=list)

    def add(self, where: str, began: float, problems: list[str]) -> None:
        self.trials += 1
        self.worst_seconds = max(self.worst_seconds, time.perf_counter() - began)
        self.bad += [f"{where}: {problem}" for problem in problems]

    def finish(self, name: str) -> None:
        record(name, trials=self.trials, failures=len(self.bad), worst_seconds=self.worst_seconds)
        print(f"{name}: {self.trials} trials")
        assert self.trials >= 3
        assert not self.bad, "\n".join(self.bad[:30])


def stop_of(action: Callable[[], object]) -> BaseException | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def problems_of(error: BaseException | None, out: Path, before: list[int]) -> list[str]:
    """`before`: the checkpoints that were durable. What a run that found no room did wrong."""
    wrong = []
    if error is None and not (out / "config.json").exists():
        wrong.append("ended without a word, and without a model")
    if error is not None and not isinstance(error, ApolloError):
        wrong.append(f"no message but {error!r}")
    if isinstance(error, CheckpointError) and "checkpoints" in str(error):
        text = str(error)
        if not re.search(r"[\d,]+ bytes free", text) or not re.search(r"expected: [\d,]+ bytes", text):
            wrong.append(f"a message without what is free and needed: {text}")
    if not set(before) <= set(whole_steps(out)):
        wrong.append(f"lost checkpoints: {before} before, {whole_steps(out)} after")
    for path in resume.whole_checkpoints(out / "checkpoints"):
        wrong += [str(stopped) for stopped in [stop_of(lambda path=path: resume.check_files(path))] if stopped]
    stray = {path.name for path in (out / "checkpoints").glob("step_*")} - {f"step_{s:06}" for s in whole_steps(out)}
    return wrong + [f"under a final name without being whole: {name}" for name in stray]


def durable(operations: FileOperations) -> list[int]:
    named: list[int] = []
    synced: list[int] = []
    for line in operations.log:
        if found := re.fullmatch(r"rename checkpoints/step_(\d+)", line):
            named.append(int(found[1]))
        elif line == "fsync checkpoints":
            synced = list(named)
    return synced


def with_room_again(inputs: Path, out: Path, reference: Path, keys: tuple[str, ...]) -> list[str]:
    stopped = stop_of(lambda: go_on(inputs, out, *keys))
    return (
        [f"with room again: {stopped!r}"] if stopped else [f"with room again: {d}" for d in differences(out, reference)]
    )


def refuse_from(
    inputs: Path, folder: Path, reference: Path, first: int, number: int, keys: tuple[str, ...]
) -> tuple[list[str], str] | None:
    """From operation `first` on the system answers with error `number`. None when the run ended before."""

    def fault(operation: str) -> BaseException | None:
        if number != errno.EROFS and operation in TAKES_NO_ROOM:
            return None
        return OSError(number, os.strerror(number), str(folder))

    out = folder / "out"
    operations = FileOperations(first, out, fault)
    with pytest.MonkeyPatch.context() as patch, operations.active(patch):
        error = stop_of(lambda: train_into(inputs, out, *keys))
    if not operations.crashed:
        return None
    wrong = problems_of(error, out, durable(operations))
    if number != errno.EROFS:
        wrong += [f"left over: {path.name}" for path in (out / "checkpoints").glob(f"{publish.STAGING_PREFIX}step_*")]
    wrong += with_room_again(inputs, out, reference, keys)
    shutil.rmtree(folder)
    return wrong, operations.log[-1] if operations.log else "the start"


def refuse_everywhere(
    inputs: Path, tmp_path: Path, reference: Path, number: int, keys: tuple[str, ...], every: int
) -> Report:
    report = Report()
    for first in range(0, 5000, every):
        began = time.perf_counter()
        found = refuse_from(inputs, tmp_path / "trial", reference, first, number, keys)
        if found is None:
            return report
        report.add(f"{errno.errorcode[number]} at operation {first}, after {found[1]}", began, found[0])
    raise AssertionError("the run has more operations than were tried")


def test_a_covering_set_of_writes_finds_no_room(inputs: Path, tmp_path: Path, reference: Path) -> None:
    report = refuse_everywhere(inputs, tmp_path, reference, errno.ENOSPC, KEYS, COVERING)
    report.finish("no room at a write of a run (a covering set)")


@pytest.mark.long
@pytest.mark.parametrize("keys", [KEYS, (*KEYS, SYNCHRONOUS)], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.timeout(3600)
def test_every_write_finds_no_room(
    inputs: Path, tmp_path: Path, reference: Path, number: int, keys: tuple[str, ...]
) -> None:
    how = "synchronous" if SYNCHRONOUS in keys else "asynchronous"
    report = refuse_everywhere(inputs, tmp_path, reference, number, keys, 1)
    report.finish(f"{errno.errorcode[number]} at every write of a run ({how})")


def limits(reference: Path) -> list[int]:
    """One byte less than each kind of file of a checkpoint takes, and half of it."""
    folder = max(reference.glob("checkpoints/step_*"))
    sizes = {path.stat().st_size for path in folder.rglob("*") if path.is_file()} - {0}
    return sorted({size - 1 for size in sizes} | {size // 2 for size in sizes})


@pytest.mark.parametrize("how", ["asynchronous", pytest.param("synchronous", marks=pytest.mark.long)])
def test_files_that_may_not_grow(inputs: Path, tmp_path: Path, reference: Path, how: str) -> None:
    report = Report()
    keys = (*KEYS, *([SYNCHRONOUS] if how == "synchronous" else []))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits(reference)[:: 1 if how == "synchronous" else 3]:
        out = tmp_path / "trial" / "out"
        out.parent.mkdir()
        began = time.perf_counter()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            error = stop_of(lambda out=out: train_into(inputs, out, *keys))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        wrong = problems_of(error, out, []) + ([] if error else ["no error, though a file could not be written"])
        wrong += [f"left over: {path.name}" for path in (out / "checkpoints").glob(f"{publish.STAGING_PREFIX}step_*")]
        report.add(f"files of at most {limit} bytes", began, wrong + with_room_again(inputs, out, reference, keys))
        shutil.rmtree(out.parent)
    report.finish(f"files that may not grow beyond a size ({how})")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Ballast(threading.Thread):
    """Once a checkpoint is there, a file that leaves so many bytes of the disk free."""

    def __init__(self, out: Path, leave: int) -> None:
        super().__init__()
        self._out, self._leave, self._ended = out, leave, threading.Event()
        self.path = out.parent / "ballast"

    def run(self) -> None:
        while not list(self._out.glob(f"checkpoints/step_*/{publish.DIRECTORY_MANIFEST}")):
            if self._ended.wait(0.0005):
                return
        with self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(self._out).free - self._leave))

    def end(self) -> None:
        self._ended.set()
        self.join()
        self.path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["asynchronous", pytest.param("synchronous", marks=pytest.mark.long)])
def test_a_disk_that_fills_up(inputs: Path, small_disk: Path, tmp_path: Path, how: str) -> None:
    """The moment is of chance; whatever the run met, it must not have lost anything."""
    report = Report()
    keys = (
        "trainer.total_training_steps=12",
        *KEYS[1:],
        "trainer.max_ckpt_to_keep=99",
        *([SYNCHRONOUS] if how == "synchronous" else []),
    )
    reference = tmp_path / "longer"
    train_into(inputs, reference, *keys)
    one = sum(path.stat().st_size for path in max(reference.glob("checkpoints/step_*")).rglob("*") if path.is_file())
    stopped = 0
    leaves = (0, one // 4, one * 3 // 2, 4096, 20_000, one // 2, one - 8192, one, one * 5 // 2)
    for leave in leaves if how == "synchronous" else leaves[:3]:
        out = small_disk / "out"
        ballast = Ballast(out, leave)
        ballast.start()
        began = time.perf_counter()
        error = stop_of(lambda: train_into(inputs, out, *keys))  # noqa: B023
        stopped += error is not None
        wrong = problems_of(error, out, [1])
        ballast.end()
        report.add(f"{leave} bytes left", began, wrong + with_room_again(inputs, out, reference, keys))
        shutil.rmtree(out)
    report.finish(f"a small disk that fills up ({how})")
    assert stopped >= 2
