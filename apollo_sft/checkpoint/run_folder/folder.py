"""The folder of one run: which process may use it, where its files are, and run.json. Only rank 0 uses it.

Names are ours only where a run was: `RunFolder.claim` refuses a folder with files of others before it writes any.
"""

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
"""The value of `kind` in run.json: a folder with it is ours."""
RUN_JSON = "run.json"
TIME = "%Y-%m-%dT%H:%M:%S%z"
OWN_NAMES = frozenset(
    {RUN_JSON, "metrics.jsonl", "config.yaml", "data_audit.json", "rejected.jsonl", "findings.jsonl", "samples.jsonl"}
    | {"adapter", "checkpoints", "profile", "tensorboard", "wandb", "mlflow", "swanlab", "trackio"}
)
PROBE = publish.PREFIX + "probe"
"""Written and removed at the start of a run; one that a kill left behind is removed at the next start."""
ARCHIVING_PREFIX = publish.PREFIX + "previous-"
TIMED_FOLDER = re.compile(r"(previous|model)-\d{8}-\d{6}(-\d+)?")
PACKAGES = ("torch", "transformers", "apollo-sft")

Status = Literal["running", "finished", "failed", "refused", "preempted"]


class RunFolder:
    """A claimed folder. `notes`: what claiming it changed, in words. `resume_from`: the checkpoint to resume from."""

    def __init__(self, root: Path, lock: FolderLock, notes: list[str]) -> None:
        self.root = root
        self.notes = notes
        self.metrics = root / "metrics.jsonl"
        self.config_yaml = root / "config.yaml"
        self.run_json = root / RUN_JSON
        self.audit = root / "data_audit.json"
        self.rejected = root / "rejected.jsonl"
        self.findings = root / "findings.jsonl"
        self.checkpoints = root / "checkpoints"
        self.resume_from: Path | None = None
        self._lock = lock
        self._facts: dict[str, Any] = {}
        self._started = now()
        self._versions = versions()

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
        of ours moves to `previous-<time>/`; one that trained nothing is overwritten; one of the same `config` is
        resumed from its newest complete checkpoint. With "resume_path" a new run begins at `source`, a checkpoint of
        any run. `allow_changes`: also when `config` would change the samples or the model.
        `say` is called before a long wait.
        Raises: ConfigError for files that are not ours, a run of another config or a live one, or a folder that cannot
        be written; AlreadyDone when the earlier run is complete.
        """
        root = Path(path).expanduser().absolute()
        _refuse_foreign_files(root)
        _make_writable(root)
        lock = FolderLock(root, say=say)

        try:
            # Files may only be moved under the lock: a live run could be in the middle of the same move.
            notes = lock.notes + publish.recover(root)
            if any(root.glob(f"{ARCHIVING_PREFIX}*")):
                from apollo_sft.checkpoint.run_folder.archive import finish_archiving

                notes += finish_archiving(root)

            earlier = read_run(root)
            if earlier is not None and resume_mode == "disable":
                from apollo_sft.checkpoint.run_folder.archive import archive_run

                notes.append(f"moved the earlier run to {archive_run(root).name}/")
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
        """Set `resume_from`: the newest checkpoint of the earlier run here, else `source`, else None."""
        if earlier is not None and _trained_something(self.root):
            saved: dict[str, Any] = {}
            if self.config_yaml.is_file():
                saved = yaml.safe_load(self.config_yaml.read_text(encoding="utf-8"))
            resume.check_same(saved, config, f"{KEY}={self.root}", allow, self.notes)
            self._resume(earlier, source)

        if source is not None:
            self._facts["forked_from"] = source
            # Once the new run has a checkpoint of its own, `source` is only where it began.
            if self.resume_from is None:
                self.resume_from = resume.fork_point(source, config, allow, self.notes)
                self.notes.append(f"resuming from {self.resume_from}")

    def _resume(self, earlier: Mapping[str, Any], source: str | None) -> None:
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
            # A kill between a checkpoint and its link, or a damaged checkpoint, leaves the link at another one.
            publish.point(self.checkpoints / resume.LATEST, self.resume_from.name)
            place = self.resume_from.name
        elif source is not None:
            return
        else:
            place = "the first step: it has no checkpoint"

        self.notes.append(f"resuming the run that began {earlier.get('started')} from {place}")

    def write_run(self, status: Status, **facts: Any) -> None:
        """Write run.json: what runs, where, since when, and how it ended. Facts of earlier calls are kept."""
        self._facts |= facts
        content = {
            "kind": MARKER,
            "status": status,
            "started": self._started,
            "finished": None if status == "running" else now(),
            "command": sys.orig_argv,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": self._versions,
            **self._facts,
        }
        # The command line and the facts may hold a token or the password of a URL.
        text = json.dumps(redact(content), indent=2, ensure_ascii=False, default=str)
        publish.write_durably(self.run_json, text + "\n")

    def write_config(self, text: str) -> None:
        """Write config.yaml, the resolved configuration."""
        publish.write_durably(self.config_yaml, text)

    @contextmanager
    def probe(self) -> Iterator[str]:
        """Keep a file in the folder for as long as the context lasts. Yield its text, which `sees_probe` looks for."""
        text = secrets.token_hex(8)
        try:
            publish.write_durably(self.root / PROBE, text)
            yield text
        finally:
            (self.root / PROBE).unlink(missing_ok=True)

    @contextmanager
    def released_on_failure(self) -> Iterator[None]:
        """Release the folder when the context ends by an exception, and only then."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let another run claim the folder. The end of the process does the same."""
        self._lock.release()


def sees_probe(path: str | Path, text: str, patience_seconds: float = 10) -> bool:
    """Return whether the folder at `path` is the one in which a run shows this text now.

    `patience_seconds`: for network file systems, which show a file of another host late.
    """
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
    """Read run.json of a folder of ours; None when there is none, or one that is not ours."""
    content = publish.json_object(folder / RUN_JSON)
    if content is None or content.get("kind") != MARKER:
        return None
    return content


def status_of(exit_code: int) -> Status:
    """Return the status in run.json of a run that ended with this code, which is not 0."""
    endings: dict[int, Status] = {2: "refused", 75: "preempted"}
    return endings.get(exit_code, "failed")


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Return the versions of Python, of the packages that the numbers depend on, and of `more`. Import none of them."""
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

    # A run makes no links at this level. One made by somebody else would let our writes go out of the folder.
    ours = _own_names(root)
    links = [f"{path.name} (a link)" for path in entries if path.is_symlink()]
    plain = [path for path in entries if not path.is_symlink()]
    foreign = links + [path.name for path in plain if path.name not in ours and not is_kept(path)]

    if foreign:
        shown = ", ".join(foreign[:5])
        if len(foreign) > 5:
            shown += f" and {len(foreign) - 5} more"

        raise ConfigError(
            f"{KEY}={root} holds files that are not from a run of ours; nothing was touched",
            found=shown,
            expected="a new or empty folder",
            fix=f"choose another {KEY}, or move these files away",
        )


def _own_names(root: Path) -> set[str]:
    """Return the names that a run of ours uses. Without a run.json of ours, only our hidden files are ours."""
    names = {path.name for path in root.glob(f"{publish.PREFIX}*")}
    if read_run(root) is None:
        return names
    of_model = {name.partition("/")[0] for name in publish.model_files(root)}
    return names | OWN_NAMES | of_model


def is_kept(path: Path) -> bool:
    """Return whether a path is an earlier run or an earlier model that was moved aside."""
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
    """Return whether a run has published its model, or an adapter alone."""
    return bool(publish.model_files(root)) or (root / "adapter").is_dir()


def _trained_something(root: Path) -> bool:
    metrics = root / "metrics.jsonl"
    checkpoints = root / "checkpoints"
    has_steps = metrics.is_file() and metrics.stat().st_size > 0
    has_checkpoints = checkpoints.is_dir() and any(checkpoints.iterdir())
    return has_steps or has_checkpoints or bool(publish.model_files(root))


def now() -> str:
    """Return the local time as run.json has it."""
    return time.strftime(TIME)
