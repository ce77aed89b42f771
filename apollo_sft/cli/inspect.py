"""`apollo-sft inspect`: what would be trained, token by token, before a GPU or a weight is touched."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_sft.cli.arguments import Parser
from apollo_sft.cli.job import compose_job
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from apollo_sft.tools.inspect.inspection import Inspection, Pick, Split

HELP = """apollo-sft inspect [options] key=value …

Takes the keys of a training and shows what it would train on: every file from rows to targets, lengths, packing, the
number of steps, what is not trained and why, and samples with their targets marked. It needs no GPU and no weights:
config.json and the tokenizer of model.partial_pretrain are enough. What it tokenises, the training finds again.

  --row N, --row FILE:N  show the samples of this row, uncut; more than once for more rows
  --worst                show the longest samples, those with the least share of targets, and cut ones
  --random               show samples drawn at random
  --count K              how many of them [3]
  --seed S               which of them [1]
  --val                  show samples of the validation data instead
  --ids                  show token ids too
  --html FILE            write all of it as one page
  --dump FILE            write one JSON line a sample: file, row, input_ids, labels, targets
  --check                exit with 1 when a row is refused, dropped or cut, or is validated on and trained
  --nproc N              processes of the training [1, or what the keys say]
  --help                 this text

Exit codes: 0 done, 1 a check failed, 2 refused: the keys, the model or an entire file cannot be used."""
CHECK_FAILED = 1


def main(arguments: list[str]) -> int:
    """Inspect the data of a training. Return the exit code: 0 done, 1 a check failed.

    Raises: ApolloError for what a training would refuse as well, but for single rows.
    """
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    options, overrides = _parse(arguments)
    composed = compose_job(overrides)
    if composed is None:
        return 0

    for path in (options.html, options.dump):
        _check_writable(path)

    try:
        return _inspect(composed.config, options)
    except DataError as error:
        if not options.check:
            raise
        print(f"apollo-sft: {error}", file=sys.stderr)
        return CHECK_FAILED
    except BrokenPipeError:  # `| head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our own options, which may be anywhere in the line, and the rest of it. Raises: ConfigError."""
    parser = Parser(prog="apollo-sft inspect", add_help=False, allow_abbrev=False)
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--count", type=_number(1), default=3)
    parser.add_argument("--seed", type=_number(0), default=1)
    parser.add_argument("--nproc", type=_number(1))
    for flag in ("--worst", "--random", "--val", "--ids", "--check"):
        parser.add_argument(flag, action="store_true")

    for flag in ("--html", "--dump"):
        parser.add_argument(flag, type=Path)

    # Keys of a training are not known to the parser: they are the rest. A wrong option would be among them.
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("-") and "=" not in argument and argument != "--cfg":
            close = difflib.get_close_matches(argument, [f"--{name}" for name in vars(options)], n=1)
            fix = "apollo-sft inspect --help"
            if close:
                fix = f"did you mean {close[0]}?"
            raise ConfigError(f"apollo-sft inspect has no option {argument}", fix=fix)

    return options, rest


def _number(least: int) -> Callable[[str], int]:
    """Return a type of argparse for whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} on, not {text!r}")
        return int(text)

    return number


def _check_writable(path: Path | None) -> None:
    """Raise ConfigError for a file that cannot be written, before the work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{path} cannot be written", expected="a file in a folder that exists")


def _inspect(config: SftConfig, options: argparse.Namespace) -> int:
    """Inspect the data, write what is wanted, and return the exit code."""
    from apollo_sft.report.page import html
    from apollo_sft.report.screen import screen, show
    from apollo_sft.tools.inspect.counts import write_dump  # torch, after everything that can be refused without it
    from apollo_sft.tools.inspect.inspection import inspect_data
    from apollo_sft.tools.inspect.inspection_document import document

    found = inspect_data(config, options.nproc)
    split = _shown_split(found, options.val)
    selected = _picks(split, options)
    from apollo_sft.tools.inspect.inspection import usual

    console = screen()
    shown = selected or [(split, pick) for pick in usual(split.store)]
    show(document(found, shown, bool(options.row)), console, options.ids)
    console.print()

    if options.html is not None:
        page = html(document(found, _picks_of_page(split, selected, options), whole=False, first=True))
        options.html.write_text(page, encoding="utf-8")
        console.print(f"{options.html}: the same as a page", style="bold", markup=False)
    if options.dump is not None:
        number = write_dump([(part.name, part.store) for part in found.splits], found.prepared.tokenizer, options.dump)
        console.print(f"{options.dump}: {number:,} samples", style="bold", markup=False)

    return _conclude(found, options.check)


def _shown_split(found: Inspection, val: bool) -> Split:
    """Return the dataset that is shown. Raises: ConfigError when there is no validation data."""
    if val and len(found.splits) == 1:
        raise ConfigError("--val: there is no validation data", found="data.val_files=null")
    if val:
        return found.splits[1]
    return found.splits[0]


def _picks(split: Split, options: argparse.Namespace) -> list[tuple[Split, Pick]]:
    """Return the samples that the options select. Raises: ConfigError for a row that does not exist."""
    from apollo_sft.tools.inspect.inspection import at_random, of_row, worst

    picks: list[Pick] = []
    for place in options.row:
        picks += of_row(split.store, place)

    if options.worst:
        picks += worst(split.store)
    if options.random:
        picks += at_random(split.store, options.count, options.seed)
    return [(split, pick) for pick in picks]


def _picks_of_page(
    split: Split, selected: list[tuple[Split, Pick]], options: argparse.Namespace
) -> list[tuple[Split, Pick]]:
    """Return the selected rows; else a usual sample first, and the selected samples, or some of every kind."""
    from apollo_sft.tools.inspect.inspection import at_random, usual, worst

    if options.row:
        return selected

    some = [*at_random(split.store, options.count, options.seed), *worst(split.store)]
    first = [(split, pick) for pick in usual(split.store)]
    return first + (selected or [(split, pick) for pick in some])


def _conclude(found: Inspection, check: bool) -> int:
    """Print the result of `--check`, and return the exit code."""
    if not check:
        return 0
    if not found.problems:
        print("check passed: every row is trained completely, and none is validated on")
        return 0

    for problem in found.problems:
        print(f"check failed: {problem}")

    return CHECK_FAILED
