"""Write prepared files aside, then move them into place. A file of another program is never replaced.

`manifest.json` lists every file with its sha256 and is moved last: files that differ from it were not all moved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from apollo_sft.checkpoint.publish import STAGING_PREFIX, describe_file, describe_files, staging_folder, sync_tree
from apollo_sft.checkpoint.publish import sync_folder as sync_names
from apollo_sft.data.read.files import Row
from apollo_sft.errors import DataError
from apollo_sft.types import RowRef

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
STAGING = "prepare"
ROW_GROUP = 2000


class Output:
    """The folder that is written. Use it as a context: staged files are removed when an error ends it.

    Raises: DataError at once when there is a file in the way that this program did not write.
    """

    def __init__(self, folder: Path, splits: Sequence[str], overwrite: bool) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self.names = [*(f"{split}.parquet" for split in splits), REJECTED, MANIFEST]
        self._refuse_foreign()
        self.staging = folder / f"{STAGING_PREFIX}{STAGING}"
        self.rejected: IO[str]

    def __enter__(self) -> Output:
        staging_folder(self.folder, STAGING)
        self.rejected = (self.staging / REJECTED).open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self.rejected.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def reject(self, split: str, ref: RowRef, reason: str) -> None:
        """Write a rejected row down."""
        record = {"split": split, "file": ref.file, "row": ref.row, "reason": reason}
        self.rejected.write(json.dumps(record, ensure_ascii=False) + "\n")

    def publish(self, manifest: dict[str, Any]) -> None:
        """Add the list of files to `manifest`, and move everything into place."""
        self.rejected.close()
        manifest = manifest | {"files": describe_files(self.staging)}
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (self.staging / MANIFEST).write_text(text, encoding="utf-8")
        sync_tree(self.staging)

        # Once more: a file may have come while the rows were converted.
        self._refuse_foreign()
        for name in self.names:  # the manifest is the last one
            (self.staging / name).replace(self.folder / name)

        sync_names(self.folder)

    def _refuse_foreign(self) -> None:
        """Raise DataError for a file that is not ours: a manifest lists the sha256 of ours.

        After an interrupted move the new manifest is still in staging.
        """
        if self.overwrite:
            return

        listed = [*_listed(self.folder / MANIFEST), *_listed(self.folder / f"{STAGING_PREFIX}{STAGING}" / MANIFEST)]
        foreign = [name for name in self.names if (self.folder / name).exists() and name != MANIFEST]
        foreign = [name for name in foreign if describe_file(self.folder / name) not in listed]
        if (self.folder / MANIFEST).exists() and not _listed(self.folder / MANIFEST):
            foreign.append(MANIFEST)
        if foreign:
            raise DataError(
                f"{self.folder} holds files that this command did not write, or that were changed since",
                found=", ".join(foreign),
                fix="give another folder (--local_save_dir FOLDER), or --overwrite to replace them",
            )


class SplitWriter:
    """Writes the rows of one split to one parquet file, a row group at a time. Use it as a context."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.writer = pq.ParquetWriter(path, schema)
        self.waiting: list[Row] = []
        self.num_rows = 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self.writer.close()

    def add(self, row: Row) -> None:
        """Add a row."""
        self.waiting.append(row)
        self.num_rows += 1
        if len(self.waiting) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            self.writer.write_table(pa.Table.from_pylist(self.waiting, self.schema))
            self.waiting = []


def _listed(manifest: Path) -> list[dict[str, Any]]:
    """Return the entries of a manifest of ours; nothing for any other file."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return list(files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
