"""Data sets of the Hugging Face hub: the files of the wanted splits, at one commit, through the hub's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined] # of httpx, or of its successor

from apollo_sft.errors import DataError
from apollo_sft.prepare.raw_sources import Source, files_of_split

CONVERTED = "refs/convert/parquet"
"""Where the hub keeps a parquet copy of data sets in other forms."""
UNREACHABLE = (HTTPError, OfflineModeIsEnabled, OSError, ValueError)


def hub_source(name: str, splits: Sequence[str], subset: str | None, revision: str | None) -> Source:
    """The files of `splits` of the data set `name`, downloaded.

    Raises: DataError when the hub cannot be reached, knows no such data set, or a split is missing.
    """
    try:
        commit, names = _listing(name, revision)
        try:
            chosen = {split: files_of_split(names, split, subset, name) for split in splits}
        except DataError:
            if revision is not None:
                raise
            commit, names = _listing(name, CONVERTED)
            chosen = {split: files_of_split(names, split, subset, name) for split in splits}
        files = {split: [_download(name, file, commit) for file in chosen[split]] for split in splits}
    except UNREACHABLE as error:
        raise DataError(
            f"the data set {name!r} cannot be read from the hub",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected="a local folder, or a data set of a hub that can be reached",
            fix=f"download it elsewhere and give the folder: --local_dataset_path FOLDER --data_source {name}",
        ) from error
    return Source("hub", name, commit, files)


def _listing(name: str, revision: str | None) -> tuple[str, list[str]]:
    info = HfApi().dataset_info(name, revision=revision)
    return info.sha or "", [file.rfilename for file in info.siblings or []]


def _download(name: str, file: str, commit: str) -> Path:
    return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
