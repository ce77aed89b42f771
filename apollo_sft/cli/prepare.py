"""`apollo-sft prepare DATASET`: files that SFT and RL read, from a data set of the hub or from local files."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from apollo_sft.errors import ConfigError
from apollo_sft.prepare import gsm8k
from apollo_sft.prepare.hub import hub_source
from apollo_sft.prepare.next_step import commands, training_keys
from apollo_sft.prepare.output import Output
from apollo_sft.prepare.preparation import Say, Task, prepare
from apollo_sft.prepare.sources import Source, local_source

DATASETS = {
    "gsm8k": "grade-school math: question, worked answer, `#### result`",
}
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code 0. Raises: ApolloError for what cannot be prepared; nothing is written then."""
    given = _parse(argv)
    if given.hdfs_dir:
        raise ConfigError(
            "--hdfs_dir is not built",
            found=given.hdfs_dir,
            fix="leave it out, and copy the folder with `hdfs dfs -put`; manifest.json tells whether all arrived",
        )
    say: Say = print if logging.getLevelName(given.log_level) <= logging.INFO else _say_nothing
    splits = [split.strip() for split in given.splits.split(",") if split.strip()]
    folder = _folder(given)
    with Output(folder, splits, given.overwrite) as output:
        source = _source(given, splits)
        say(f"{given.dataset}: {source.kind} {source.name}")
        done = prepare(_task(given), source, output, say)
    _say_written({name: split.file for name, split in done.items()}, say)
    return 0


def _say_nothing(text: str) -> None:
    """--log_level WARNING and above."""
    del text


def _say_written(files: dict[str, Path], say: Say) -> None:
    for file in files.values():
        say(f"wrote {file}")
    say(f"\nTrain on it:\n\n{commands(training_keys(files))}")


def _task(given: argparse.Namespace) -> Task:
    return gsm8k.task(given.data_source, given.instruction)


def _source(given: argparse.Namespace, splits: list[str]) -> Source:
    """--local_dataset_path, or --data_source where that is a local path, or the hub."""
    local = given.local_dataset_path or (given.data_source if Path(given.data_source).expanduser().exists() else None)
    if local is not None:
        return local_source(Path(local).expanduser(), splits, given.subset)
    return hub_source(given.data_source, splits, given.subset, given.revision)


def _folder(given: argparse.Namespace) -> Path:
    """--local_save_dir is the folder itself. --local_dir is too, for data sets with a folder of their own."""
    if given.local_save_dir:
        return Path(given.local_save_dir).expanduser()
    return Path(given.local_dir or f"~/data/{given.dataset}").expanduser()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="apollo-sft prepare", description=__doc__, allow_abbrev=False)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name, meaning in DATASETS.items():
        _add_options(datasets.add_parser(name, help=meaning, description=meaning, allow_abbrev=False))
    given = parser.parse_args(argv)
    given.data_source = given.data_source or gsm8k.DATA_SOURCE
    given.subset = given.subset or gsm8k.SUBSET
    return given


def _add_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, default: str | None = None) -> None:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, default=default, help=text)

    add("data_source", "id of a data set of the hub, or a local folder; the name that the rows carry")
    add("local_dataset_path", "read this folder, parquet file or JSON lines instead of the hub")
    add("subset", "folder of the data set that is meant, where it has several (a configuration of the hub)")
    add("revision", "branch, tag or commit of the data set on the hub")
    add("splits", "splits to prepare [train,test]", "train,test")
    add("local_save_dir", "folder to write into")
    add("local_dir", "the same, as older scripts call it")
    add("instruction", "what every question ends with; '' for nothing")
    add("hdfs_dir", "not built: refused")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this command did not write")
    parser.add_argument("--log_level", "--log-level", default="INFO", type=str.upper, choices=LEVELS)
