"""The folder of one run: who may use it, what lies where, and what run.json says. Only rank 0 comes here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.checkpoint.run_folder.lock import FolderLock
from apollo_sft.errors import AlreadyDone, ConfigError
from apollo_sft.redact import redact
from apollo_sft.types import ignore

KEY = "trainer.default_local_dir"
MARKER = "apollo-sft run"
"""What run.json says in `kind`: a folder with it is ours."""
RUN_JSON = "run.json"
TIME = "%Y-%m-%dT%H:%M:%S%z"
OWN_NAMES = frozenset(
    {RUN_JSON, "metrics.jsonl", "config.yaml", "data_audit.json", "rejected.jsonl", "samples.jsonl"}
    | {"adapter", "checkpoints", "profile", "tensorboard", "wandb", "mlflow", "swanlab", "trackio"}
)
PROBE = publish.PREFIX + "probe"
"""Written and removed at the start of a run; one that a kill left behind is removed at the next start."""
ARCHIVING_PREFIX = publish.PREFIX + "previous-"
TIMED_FOLDER = re.compile(r"(previous|model)-\d{8}-\d{6}(-\d+)?")
PACKAGES = ("torch", "transformers", "apollo-sft")

Status = Literal["running", "finished", "failed", "refused", "preempted"]


class RunFolder:
    """A claimed folder. `notes` says in words what claiming it changed. `resume_from`: the checkpoint to go on from."""

    def __init__(self, root: Path, lock: FolderLock, notes: list[str]) -> None:
        self.root = root
        self.notes = notes
        self.metrics = root / "metrics.jsonl"
        self.config_yaml = root / "config.yaml"
        self.run_json = root / RUN_JSON
        self.audit = root / "data_audit.json"
        self.rejected = root / "rejected.jsonl"
        self.checkpoints = root / "checkpoints"
        self.resume_from: Path | None = None
        self._lock = lock
        self._facts: dict[str, Any] = {}
        self._started = _now()

    @classmethod
    def claim(
        cls,
        path: str | Path,
        resume_mode: str,
        config: Mapping[str, Any],
        source: str | None = None,
        allow_changes: bool = False,
        say: Callable[[str], object] = ignore,
    ) -> RunFolder:
        """Take the folder for this run, or refuse, before anything in it was changed. Call `write_run` next.

        A save that an earlier run was killed in is finished or undone. With `resume_mode` "disable" an earlier run
        of ours moves to `previous-<time>/`; one that trained nothing is written over; one of the same `config` is gone
        on with, from its newest whole checkpoint. With "resume_path" a new run begins at `source`, a checkpoint of
        any run. `allow_changes`: also when `config` would change the samples or the model.
        `say` is told of a long wait.
        Raises: ConfigError for files that are not ours, a run of another config or a live one, or a folder that cannot
        be written; AlreadyDone when the earlier run is complete.
        """
        root = Path(path).expanduser().absolute()
        _refuse_foreign_files(root)
        _make_writable(root)
        lock = FolderLock(root, say=say)
        try:
            notes = lock.notes + publish.recover(root) + _finish_archiving(root)
            earlier = read_run(root)
            if earlier is not None and resume_mode == "disable":
                notes.append(f"moved the earlier run to {_archive(root).name}/")
                earlier = None
            folder = cls(root, lock, notes)
            folder._find_start(earlier, config, source, allow_changes)
        except BaseException:
            lock.release()
            raise
        return folder

    def _find_start(
        self, earlier: Mapping[str, Any] | None, config: Mapping[str, Any], source: str | None, allow: bool
    ) -> None:
        if earlier is not None and _trained_something(self.root):
            saved = yaml.safe_load(self.config_yaml.read_text(encoding="utf-8")) if self.config_yaml.is_file() else {}
            resume.check_same(saved, config, f"{KEY}={self.root}", allow, self.notes)
            self._go_on(earlier, source)
        if source is not None:
            self._facts["forked_from"] = source
            if self.resume_from is None:
                self.resume_from = resume.fork_point(source, config, allow, self.notes)
                self.notes.append(f"going on from {self.resume_from}")

    def _go_on(self, earlier: Mapping[str, Any], source: str | None) -> None:
        if earlier.get("status") == "finished" and _has_model(self.root):
            raise AlreadyDone(
                f"the run in {self.root} is complete; there is nothing left to do",
                fix="trainer.resume_mode=disable trains again and keeps that run in previous-<time>/",
            )
        publish.recover(self.checkpoints)
        self.resume_from = resume.newest_checkpoint(self.checkpoints, self.notes)
        if source is not None and source != earlier.get("forked_from"):
            resume.check_newest(source, self.resume_from, self.root)
        if self.resume_from is not None:
            publish.point(self.checkpoints / resume.LATEST, self.resume_from.name)
        elif source is not None:
            return
        place = "the first step: it has no checkpoint" if self.resume_from is None else self.resume_from.name
        self.notes.append(f"going on with the run that began {earlier.get('started')} from {place}")

    def write_run(self, status: Status, **facts: Any) -> None:
        """Write run.json: what runs, where, since when, and how it ended. Facts of earlier calls are kept."""
        self._facts |= facts
        content = {
            "kind": MARKER,
            "status": status,
            "started": self._started,
            "finished": None if status == "running" else _now(),
            "command": sys.orig_argv,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": versions(),
            **self._facts,
        }
        publish.write_durably(
            self.run_json, json.dumps(redact(content), indent=2, ensure_ascii=False, default=str) + "\n"
        )

    def write_config(self, text: str) -> None:
        """Write config.yaml, the resolved configuration."""
        publish.write_durably(self.config_yaml, text)

    @contextmanager
    def probe(self) -> Iterator[str]:
        """A file in the folder while this lasts. Gives its text, by which `sees_probe` knows it."""
        text = secrets.token_hex(8)
        try:
            publish.write_durably(self.root / PROBE, text)
            yield text
        finally:
            (self.root / PROBE).unlink(missing_ok=True)

    @contextmanager
    def released_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let another run claim the folder. The end of the process does the same."""
        self._lock.release()


def sees_probe(path: str | Path, text: str, patience_seconds: float = 10) -> bool:
    """Whether the folder at `path` is the one in which a run shows this text now. Network folders may be late."""
    file = Path(path).expanduser().absolute() / PROBE
    deadline = time.monotonic() + patience_seconds
    while True:
        with suppress(OSError):
            if file.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder of ours; None when there is none, or one that is not ours."""
    try:
        content = json.loads((folder / RUN_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("kind") == MARKER else None


def status_of(exit_code: int) -> Status:
    """What run.json says of a run that ended with this code, which is not 0."""
    endings: dict[int, Status] = {2: "refused", 75: "preempted"}
    return endings.get(exit_code, "failed")


def settle_run(folder: Path, code: int, since: float) -> int:
    """Make run.json say what the exit code says, of a run that began after `since` (seconds since 1970) and is over.

    Rank 0 may have been killed before it could. Returns the exit code: 0 when run.json says that the run was finished,
    and not that its model had still to be uploaded.
    """
    run = read_run(folder)
    if run is None or datetime.strptime(run["started"], TIME).timestamp() < int(since):
        return code
    if run["status"] == "finished":
        return code if run.get("uploaded") is False else 0
    status = status_of(code)
    if run["status"] != status:
        changed = run | {"status": status, "finished": run["finished"] or _now()}
        publish.write_durably(folder / RUN_JSON, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
    return code


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Versions of Python and of the packages that the numbers depend on, and of `more`; imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _refuse_foreign_files(root: Path) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise ConfigError(f"{KEY} is not a folder", found=root, expected="a new or empty folder")
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise ConfigError(f"{KEY}={root} cannot be read", found=error) from error
    ours = _own_names(root)
    links = [f"{path.name} (a link)" for path in entries if path.is_symlink()]  # we make none here, and follow none
    plain = [path for path in entries if not path.is_symlink()]
    foreign = links + [path.name for path in plain if path.name not in ours and not _is_kept(path)]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ConfigError(
            f"{KEY}={root} holds files that are not from a run of ours; nothing was touched",
            found=", ".join(foreign[:5]) + more,
            expected="a new or empty folder",
            fix=f"choose another {KEY}, or move these files away",
        )


def _own_names(root: Path) -> set[str]:
    """Names that a run of ours uses, where one was here: without run.json only our hidden files are ours."""
    names = {path.name for path in root.glob(f"{publish.PREFIX}*")}
    of_model = {name.partition("/")[0] for name in publish.model_files(root)}
    return names | OWN_NAMES | of_model if read_run(root) is not None else names


def _is_kept(path: Path) -> bool:
    """An earlier run that was moved aside, or a model that was."""
    if not TIMED_FOLDER.fullmatch(path.name) or path.is_symlink():
        return False
    return read_run(path) is not None or (path / publish.DIRECTORY_MANIFEST).is_file()


def _make_writable(root: Path) -> None:
    probe = root / PROBE
    try:
        root.mkdir(parents=True, exist_ok=True)
        publish.write_durably(probe, "")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{KEY}={root} cannot be written", found=error, fix=f"choose another {KEY}") from error


def _has_model(root: Path) -> bool:
    """What a finished run has handed over: a model, or an adapter alone."""
    return bool(publish.model_files(root)) or (root / "adapter").is_dir()


def _trained_something(root: Path) -> bool:
    metrics, checkpoints = root / "metrics.jsonl", root / "checkpoints"
    has_steps = metrics.is_file() and metrics.stat().st_size > 0
    has_checkpoints = checkpoints.is_dir() and any(checkpoints.iterdir())
    return has_steps or has_checkpoints or bool(publish.model_files(root))


def _archive(root: Path) -> Path:
    """Move the run in `root` to `previous-<time>/`, by way of a hidden folder that says where to go on after a kill."""
    name = time.strftime("previous-%Y%m%d-%H%M%S")
    taken = sum(path.name.startswith(name) for path in root.iterdir())
    final = root / (name if not taken else f"{name}-{taken + 1}")
    hidden = root / f"{publish.PREFIX}{final.name}"
    hidden.mkdir()
    publish.sync_folder(root)
    return _move_run(root, hidden)


def _finish_archiving(root: Path) -> list[str]:
    return [
        f"finished moving an earlier run to {_move_run(root, hidden).name}/"
        for hidden in sorted(root.glob(f"{ARCHIVING_PREFIX}*"))
        if hidden.is_dir() and not hidden.is_symlink()
    ]


def _move_run(root: Path, hidden: Path) -> Path:
    """config.json first, so that no half of a model loads; the lists of what is ours after that, run.json last."""
    files = publish.model_files(root)
    aside = [path.name for path in root.glob("model-*") if _is_kept(path)]
    for name in [*files[:-1], *sorted(OWN_NAMES - {RUN_JSON}), *aside, *files[-1:], RUN_JSON]:
        if name in (publish.MANIFEST, RUN_JSON):
            publish.sync_folder(hidden)  # what they say is ours must have gone before they do
        publish.move_file(root, hidden, name)
    final = root / hidden.name.removeprefix(publish.PREFIX)
    publish.sync_folder(hidden)
    hidden.rename(final)
    publish.sync_folder(root)
    return final


def _now() -> str:
    return time.strftime(TIME)
