"""Download data sets of the Hugging Face hub: files of the wanted splits, at one commit, by the hub's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined] # of httpx, or of its successor

from apollo_sft.errors import DataError
from apollo_sft.prepare.raw_sources import Source, files_of_split

CONVERTED = "refs/convert/parquet"
"""The revision with the hub's parquet copy of data sets in other formats."""
UNREACHABLE = (HTTPError, OfflineModeIsEnabled, OSError, ValueError)


def hub_source(name: str, splits: Sequence[str], subset: str | None, revision: str | None) -> Source:
    """Download the files of `splits` of the data set `name`.

    Raises: DataError when the hub cannot be reached, knows no such data set, or a split is missing.
    """
    try:
        commit, names = _listing(name, revision)
        try:
            chosen = {split: files_of_split(names, split, subset, name) for split in splits}
        except DataError:
            # The converted copy is another revision: it cannot stand in for one that the user has named.
            if revision is not None:
                raise
            commit, names = _listing(name, CONVERTED)
            chosen = {split: files_of_split(names, split, subset, name) for split in splits}

        files: dict[str, list[Path]] = {}
        for split in splits:
            files[split] = [_download(name, file, commit) for file in chosen[split]]
    except UNREACHABLE as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(
            f"the data set {name!r} cannot be read from the hub",
            found=f"{type(error).__name__}: {first_line}",
            expected="a local folder, or a data set of a hub that can be reached",
            fix=f"download it elsewhere and give the folder: --local_dataset_path FOLDER --data_source {name}",
        ) from error

    return Source("hub", name, commit, files)


def _listing(name: str, revision: str | None) -> tuple[str, list[str]]:
    info = HfApi().dataset_info(name, revision=revision)
    return info.sha or "", [file.rfilename for file in info.siblings or []]


def _download(name: str, file: str, commit: str) -> Path:
    return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
