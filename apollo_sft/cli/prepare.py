"""`apollo-sft prepare DATASET`: write files that SFT and RL read, from a data set of the hub or from local files."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apollo_sft.errors import ConfigError
from apollo_sft.prepare import custom, gsm8k, informal_math, multiturn, sft_no_tool, sft_tool
from apollo_sft.prepare.hub import hub_source
from apollo_sft.prepare.next_step import commands, training_keys
from apollo_sft.prepare.output import Output
from apollo_sft.prepare.preparation import Say, Task, check_columns, prepare, preview
from apollo_sft.prepare.raw_sources import Source, column_names, local_source
from apollo_sft.types import ignore

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set that can be prepared."""

    meaning: str
    data_source: str

    own_folder: bool = False
    """--local_dir is the folder that is written, and not its parent."""

    subset: str | None = None


DATASETS = {
    "gsm8k": Dataset("grade-school math; answers end in #### RESULT", gsm8k.DATA_SOURCE, True, gsm8k.SUBSET),
    "informal-math": Dataset("math problems; answers end in \\boxed{RESULT}", informal_math.DATA_SOURCE),
    "multiturn": Dataset("conversations of several turns, generated from a seed", multiturn.DATA_SOURCE, True),
    "sft-tool": Dataset("math with Python code and its outputs, or messages with tool calls", sft_tool.DATA_SOURCE),
    "sft-no-tool": Dataset("as informal-math, without solutions that run code", gsm8k.DATA_SOURCE, False, gsm8k.SUBSET),
    "custom": Dataset("your own columns, OpenAI messages, ShareGPT, Alpaca", custom.DATA_SOURCE),
}


def main(argv: Sequence[str]) -> int:
    """Prepare a data set. Return the exit code 0. Raises: ApolloError when it cannot; nothing is written then."""
    given = _parse(argv)
    if given.hdfs_dir:
        raise ConfigError(
            "--hdfs_dir is not supported",
            found=given.hdfs_dir,
            fix="leave it out, and copy the folder with `hdfs dfs -put`; manifest.json lists its files",
        )

    say: Say = ignore
    if logging.getLevelName(given.log_level) <= logging.INFO:
        say = print

    source, output = _source_and_output(given)
    say(f"{given.dataset}: {source.kind}, {source.name}")
    # Columns of a user's own data are guessed: the first rows show whether rightly.
    if given.dry_run or given.dataset == "custom":
        _print_first_rows(given, source)
    if given.dry_run:
        print("dry run: nothing was written")
        return 0

    with output:
        done = prepare(_task(given, source), source, output, say)

    files = {name: split.file for name, split in done.items()}
    for file in files.values():
        say(f"wrote {file}")

    largest = max(split.largest for split in done.values())
    say(f"\nTrain on it:\n\n{commands(training_keys(files, largest))}")
    return 0


def _print_first_rows(given: argparse.Namespace, source: Source) -> None:
    if given.dataset == "custom":
        print(_layout(given, source).describe())
    task = _task(given, source)
    check_columns(task, source)
    print("\n".join(preview(task, source)))


def _source_and_output(given: argparse.Namespace) -> tuple[Source, Output]:
    """Return where rows come from, and where they go. Files in the way are found before anything is downloaded."""
    if given.dataset == "multiturn":
        splits = ["train", "test"]
    else:
        splits = [split.strip() for split in given.splits.split(",") if split.strip()]

    # A split becomes the name of a file: it must not lead out of the folder.
    bad = [split for split in splits if Path(split).name != split or split.startswith(".")]
    if bad or not splits or len(set(splits)) != len(splits):
        raise ConfigError("--splits: names of splits, each once", found=given.splits, expected="train,test")

    output = Output(_folder(given), splits, given.overwrite)
    if given.dataset == "multiturn":
        return multiturn.generated_source(given.num_train, given.num_test, given.seed), output
    return _source(given, splits), output


def _source(given: argparse.Namespace, splits: list[str]) -> Source:
    """Return the source: --local_dataset_path, or --data_source where that is a local path, or the hub."""
    local = given.local_dataset_path or None
    if local is None and _is_local(given.data_source):
        local = given.data_source
    if local is not None:
        return local_source(Path(local).expanduser(), splits, given.subset)
    if given.dataset == "custom" and given.data_source == custom.DATA_SOURCE:
        raise ConfigError("nothing to read", expected="--local_dataset_path PATH, or --data_source ID of the hub")
    return hub_source(given.data_source, splits, given.subset, given.revision)


def _task(given: argparse.Namespace, source: Source) -> Task:
    """Return how rows of the data set are converted."""
    name = given.data_source
    if _is_local(name):
        name = Path(name).expanduser().resolve().name

    match given.dataset:
        case "gsm8k":
            return gsm8k.task(name, given.instruction)
        case "multiturn":
            return multiturn.task()
        case "sft-tool":
            return sft_tool.task(name, given.instruction, given.code_as)
        case "sft-no-tool":
            return sft_no_tool.task(name, given.instruction)
        case "custom":
            return custom.task(name, given.instruction, _layout(given, source))
        case _:
            return informal_math.task(name, given.instruction)


def _layout(given: argparse.Namespace, source: Source) -> custom.Layout:
    """Return which column of a user's data is what."""
    split = source.splits[0]
    # The first row tells formats with the same column names apart.
    first = next((row for _, row in source.rows(split)), {})
    by_name = custom.Layout(
        name="",
        messages=given.messages_column,
        prompt=given.prompt_column,
        response=given.response_column,
        system=given.system_column,
        tools=given.tools_column,
        ground_truth=given.ground_truth_column,
    )
    return custom.recognise(column_names(source.files[split][0]), first, by_name)


def _folder(given: argparse.Namespace) -> Path:
    """Return the folder to write: --local_save_dir, or --local_dir for data sets with a folder of their own.

    For the others --local_dir is the folder in which each source has its folder: ~/data/DigitalLearningGmbH/….
    """
    if given.local_save_dir:
        return Path(given.local_save_dir).expanduser()
    if DATASETS[given.dataset].own_folder:
        return Path(given.local_dir or f"~/data/{given.dataset}").expanduser()

    name: str = given.data_source
    if _is_local(name):
        name = Path(name).expanduser().resolve().stem
    return Path(given.local_dir or "~/data").expanduser() / name


def _is_local(data_source: str) -> bool:
    return Path(data_source).expanduser().exists()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="apollo-sft prepare", description=__doc__, allow_abbrev=False)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name, dataset in DATASETS.items():
        command = datasets.add_parser(name, help=dataset.meaning, description=dataset.meaning, allow_abbrev=False)
        command.set_defaults(data_source=dataset.data_source, subset=dataset.subset)
        _add_output_options(command, dataset)
        if name == "multiturn":
            _add_generator_options(command)
        else:
            _add_source_options(command, dataset)
        if name == "sft-tool":
            meaning = "code as calls of a tool `python`, or as fences in the assistant's text [calls]"
            command.add_argument("--code_as", "--code-as", choices=("calls", "text"), default="calls", help=meaning)
        if name == "custom":
            for what in ("prompt", "response", "messages", "system", "tools", "ground_truth"):
                _add(command, f"{what}_column", f"column that holds the {what.replace('_', ' ')}; COLUMN.FIELD works")

    return parser.parse_args(argv)


def _add(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add an option in both spellings, `--local_dir` and `--local-dir`."""
    default = None
    if name in ("data_source", "subset"):
        default = argparse.SUPPRESS  # the data set has set a default of its own
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*spellings, dest=name, default=default, help=text)


def _add_source_options(parser: argparse.ArgumentParser, dataset: Dataset) -> None:
    _add(parser, "data_source", f"id on the hub, or a local folder; the name that rows carry [{dataset.data_source}]")
    _add(parser, "local_dataset_path", "read this folder, parquet file, JSON or JSON lines file instead of the hub")
    _add(parser, "subset", "the folder to read, where a data set has several (a configuration of the hub)")
    _add(parser, "revision", "branch, tag or commit of the data set on the hub")
    parser.add_argument("--splits", default="train,test", help="splits to prepare [train,test]")
    _add(parser, "instruction", "the text at the end of every question; '' for nothing")


def _add_generator_options(parser: argparse.ArgumentParser) -> None:
    for name, default in (("num_train", multiturn.NUM_TRAIN), ("num_test", multiturn.NUM_TEST), ("seed", 1)):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, type=int, default=default, help=f"[{default}]")


def _add_output_options(parser: argparse.ArgumentParser, dataset: Dataset) -> None:
    _add(parser, "local_save_dir", "the folder to write into")
    local_dir = "writes into LOCAL_DIR/DATA_SOURCE [~/data]"
    if dataset.own_folder:
        local_dir = "the same"

    _add(parser, "local_dir", local_dir)
    _add(parser, "hdfs_dir", "not supported: refused")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this command did not write")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="show the first rows and write nothing")
    parser.add_argument("--log_level", "--log-level", default="INFO", type=str.upper, choices=LEVELS)
