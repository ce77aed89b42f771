"""`trainer.default_hdfs_dir`: the finished model to another place, by fsspec. Only rank 0 comes here.

The manifest goes first and `config.json` last, so that no part of a model loads. What an earlier, unfinished upload of
the same model has brought there whole stays.
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
"""What makes a folder load."""
COMPARED_BYTES = 1 << 20
"""Files up to this size are read back and compared; of all others the size is."""
Files = dict[str, dict[str, Any]]


def check_destination(trainer: TrainerConfig) -> None:
    """The upload will be possible: the scheme, its package, the right to write there. Before anything else is done.

    Raises: ConfigError.
    """
    if trainer.default_hdfs_dir is None:
        return
    to = without_file_scheme(trainer.default_hdfs_dir)
    local, here = Path(to).absolute(), Path(trainer.default_local_dir).expanduser().absolute()
    if not is_remote(to) and (local == here or here in local.parents or local in here.parents):
        raise ConfigError(f"{KEY} and trainer.default_local_dir lie in one another", found=to, expected="another place")
    try:
        fs, folder = filesystem(to, KEY)
    except DataError as error:
        raise ConfigError(str(error)) from error
    probe, text = f"{folder}/{publish.PREFIX}probe-{secrets.token_hex(4)}", b"a probe of apollo-sft"
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


def upload(trainer: TrainerConfig) -> None:
    """Bring the model there, and check that all of it arrived. Nothing is done where it lies whole already.

    Raises: UploadError, which says that the model is safe and how to repeat this alone.
    """
    if trainer.default_hdfs_dir is None:
        return
    to, root, start = without_file_scheme(trainer.default_hdfs_dir), Path(trainer.default_local_dir), time.monotonic()
    try:
        fs, folder = filesystem(to, KEY)
        files = _finished_files(root.expanduser())
        sent = _Destination(fs, folder).bring(root.expanduser(), files)
    except Exception as error:  # the client of a store: it may raise anything
        raise UploadError(
            f"the model was not uploaded to {shown(to)}",
            found=cause(error),
            expected=f"nothing is lost: training is done, and the model lies whole in {root}",
            fix="the same command again uploads alone",
        ) from error
    seconds, total = time.monotonic() - start, sum(facts["size"] for facts in files.values())
    if sent:
        amount = f"{sent:,} of {len(files):,} files, {total / 1e6:,.1f} MB in all"
        say(f"uploaded the model to {shown(to)}: {amount}, in {seconds:.1f} s")
    else:
        say(f"the model lies whole in {shown(to)}")


def _finished_files(root: Path) -> Files:
    """Name -> size and sha256, as they were when the model was published; the names that make it load last."""
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
    """A model there that no upload has brought is not replaced."""
    if not fs.exists(f"{folder}/{publish.MANIFEST}") and fs.exists(f"{folder}/{publish.LAST}"):
        raise ConfigError(
            f"{KEY}={shown(to)} holds a model that no upload has brought there",
            found=publish.LAST,
            expected="a new or empty folder, or one that this key wrote",
            fix=f"another {KEY}; nothing was changed",
        )


class _Destination:
    """A folder in a file system of fsspec."""

    def __init__(self, fs: Any, folder: str) -> None:
        self._fs = fs
        self._folder = folder

    def bring(self, root: Path, files: Files) -> int:
        """The number of files that were sent. Raises: what the store raises; OSError for what did not arrive."""
        fs = self._fs
        fs.invalidate_cache()
        if self._listed() != files:
            self._make_way(files)
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
        try:
            listed = json.loads(self._fs.cat_file(self._at(publish.MANIFEST)))["files"].items()
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return {name: facts for name, facts in listed if not {"", ".", ".."} & set(name.split("/"))}

    def _make_way(self, files: Files) -> None:
        """What makes an earlier model load goes first, then its other files; then the list of the new ones comes."""
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
                yield f"{name} is not there what it is here"
