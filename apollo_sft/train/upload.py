"""`trainer.default_hdfs_dir`: upload the finished model, by fsspec. Only rank 0 comes here.

The manifest goes first and `config.json` last, so that no part of a model loads. Files that an earlier, unfinished
upload of the same model has completed are not sent again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint import publish
from apollo_sft.config.checks import without_file_scheme
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.data.read.files import cause, is_remote, shown
from apollo_sft.data.read.remote import filesystem
from apollo_sft.errors import ConfigError, DataError, UploadError
from apollo_sft.report.log import say

KEY = "trainer.default_hdfs_dir"
LAST = (publish.LAST, "adapter_config.json")
"""Files without which a folder does not load."""
COMPARED_BYTES = 1 << 20
"""Files up to this size are read back and compared; of larger ones only the size is compared."""
Files = dict[str, dict[str, Any]]


def check_destination(trainer: TrainerConfig) -> None:
    """Check that the upload will be possible, before anything else is done: the scheme, its package, write access.

    Raises: ConfigError.
    """
    if trainer.default_hdfs_dir is None:
        return
    to = without_file_scheme(trainer.default_hdfs_dir)
    if not is_remote(to):
        _refuse_nested(Path(to).absolute(), Path(trainer.default_local_dir).expanduser().absolute())

    try:
        fs, folder = filesystem(to, KEY)
    except DataError as error:
        raise ConfigError(str(error)) from error

    probe = f"{folder}/{publish.PREFIX}probe-{secrets.token_hex(4)}"
    text = b"a probe of apollo-sft"
    try:
        fs.makedirs(folder, exist_ok=True)
        fs.pipe_file(probe, text)
        read = fs.cat_file(probe)
        fs.rm_file(probe)
    except Exception as error:  # the client of a store: it may raise anything
        raise ConfigError(
            f"{KEY}={shown(to)} cannot be written", found=cause(error), expected="a folder that can be written"
        ) from error
    if read != text:
        raise ConfigError(f"{KEY}={shown(to)} does not give back what was written", found=read[:40], expected=text)
    _refuse_foreign(fs, folder, to)


def _refuse_nested(destination: Path, run: Path) -> None:
    """Refuse a destination inside of the run folder, or around it. Raises: ConfigError."""
    if destination == run or run in destination.parents or destination in run.parents:
        raise ConfigError(
            f"{KEY} must not contain, or be inside, trainer.default_local_dir",
            found=str(destination),
            expected="a folder elsewhere",
        )


def upload(trainer: TrainerConfig) -> None:
    """Send the model, and check that all of it arrived. Nothing is sent where it is complete already.

    Raises: UploadError, which states that the model is safe and how to repeat the upload alone.
    """
    if trainer.default_hdfs_dir is None:
        return
    to = without_file_scheme(trainer.default_hdfs_dir)
    root = Path(trainer.default_local_dir)
    start = time.monotonic()
    try:
        fs, folder = filesystem(to, KEY)
        files = _finished_files(root.expanduser())
        sent = _Destination(fs, folder).send(root.expanduser(), files)
    except Exception as error:  # the client of a store: it may raise anything
        raise UploadError(
            f"the model was not uploaded to {shown(to)}",
            found=cause(error),
            expected=f"nothing is lost: training is done, and the model is complete in {root}",
            fix="the same command again uploads alone",
        ) from error

    if sent:
        seconds = time.monotonic() - start
        total = sum(facts["size"] for facts in files.values())
        amount = f"{sent:,} of {len(files):,} files, {total / 1e6:,.1f} MB in all"
        say(f"uploaded the model to {shown(to)}: {amount}, in {seconds:.1f} s")
    else:
        say(f"the model is complete in {shown(to)}")


def _finished_files(root: Path) -> Files:
    """Return size and sha256 by name, as the model was published. Files without which it does not load come last."""
    found: Files = {}
    if (root / publish.MANIFEST).is_file():
        found |= publish.read_json(root / publish.MANIFEST)["files"]
    if (root / "adapter" / publish.DIRECTORY_MANIFEST).is_file():
        of_adapter = publish.read_json(root / "adapter" / publish.DIRECTORY_MANIFEST)["files"]
        found |= {f"adapter/{name}": facts for name, facts in of_adapter.items()}
    if not found:
        raise FileNotFoundError(f"{root} holds no model of a finished run")
    return dict(sorted(found.items(), key=lambda item: (Path(item[0]).name in LAST, item[0])))


def _refuse_foreign(fs: Any, folder: str, to: str) -> None:
    """Refuse to replace a model that no upload has written. Raises: ConfigError."""
    if not fs.exists(f"{folder}/{publish.MANIFEST}") and fs.exists(f"{folder}/{publish.LAST}"):
        raise ConfigError(
            f"{KEY}={shown(to)} holds a model that was not uploaded by this program",
            found=publish.LAST,
            expected="a new or empty folder, or one that this key wrote",
            fix=f"another {KEY}; nothing was changed",
        )


class _Destination:
    """A folder in a file system of fsspec."""

    def __init__(self, fs: Any, folder: str) -> None:
        self._fs = fs
        self._folder = folder

    def send(self, root: Path, files: Files) -> int:
        """Send the files, and return how many were sent.

        Raises: the errors of the store; OSError for a file that did not arrive.
        """
        fs = self._fs
        fs.invalidate_cache()
        if self._listed() != files:
            self._clear(files)

        sent = 0
        for name, facts in files.items():
            if self._size(name) == facts["size"]:
                continue
            fs.makedirs(fs._parent(self._at(name)), exist_ok=True)
            fs.put_file(str(root / name), self._at(name))
            sent += 1

        fs.invalidate_cache()
        for problem in self._problems(root, files):
            raise OSError(problem)
        return sent

    def _at(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _listed(self) -> Files | None:
        """Return the manifest of the model there; None when there is none that can be read."""
        try:
            listed = json.loads(self._fs.cat_file(self._at(publish.MANIFEST)))["files"].items()
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        # The manifest may be anybody's: no name in it may lead out of the folder.
        return {name: facts for name, facts in listed if not {"", ".", ".."} & set(name.split("/"))}

    def _clear(self, files: Files) -> None:
        """Remove the files of an earlier model, and write the manifest of the new one.

        The files without which it does not load go first: a part of a model never loads.
        """
        earlier = self._listed() or {}
        for name in sorted({*earlier, *files}, key=lambda name: (Path(name).name not in LAST, name)):
            if self._size(name) is not None:
                self._fs.rm_file(self._at(name))
        self._fs.makedirs(self._folder, exist_ok=True)
        self._fs.pipe_file(self._at(publish.MANIFEST), json.dumps({"files": files}, indent=1).encode())
        self._fs.invalidate_cache()

    def _size(self, name: str) -> int | None:
        try:
            return int(self._fs.info(self._at(name))["size"])
        except FileNotFoundError:
            return None

    def _problems(self, root: Path, files: Files) -> Iterator[str]:
        for name, facts in files.items():
            size = self._size(name)
            if size != facts["size"]:
                yield f"{name} has {size} bytes there, not {facts['size']:,}"
            elif facts["size"] <= COMPARED_BYTES and self._fs.cat_file(self._at(name)) != (root / name).read_bytes():
                yield f"{name}: the uploaded file differs from the local one"
