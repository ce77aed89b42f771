"""`apollo-sft handoff`: check whether verl, TRL and vLLM can use a model folder."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apollo_sft.cli.arguments import Parser
from apollo_sft.cli.eval import split_overrides
from apollo_sft.config.compose import compose
from apollo_sft.errors import ConfigError

if TYPE_CHECKING:
    from apollo_sft.tools.handoff.checklist import Result
    from apollo_sft.tools.handoff.subject import Subject

HELP = """apollo-sft handoff DIR [options] [data.key=value …]

Checks a model folder against what verl, TRL and vLLM read of it: files, architecture, names, shapes and dtype of the
weights, tokenizer, chat template, stop tokens, and whether a greedy reply ends. Prompts of the training data are
compared with what training rendered, byte for byte. Every failure has a name; docs/handoff.md explains what to do.

  --data FILE …        parquet files to compare prompts on [those of the run that wrote DIR, where they still are]
  --for VERSION        the reader that is to open it: transformers==4.51. A format that it does not know is wrong
  --no-generate        load no weights
  --max-new-tokens N   the longest reply [twice the longest of the compared rows, at most 512]
  --trust-remote-code  run the folder's own code
  --json               print the result as JSON
  --help               this text

Exit codes: 0 all checks pass, 2 something is wrong."""
STYLES = {"pass": "green", "note": "yellow", "wrong": "bold red", "skipped": "dim", "not checked": "dim"}


def main(arguments: list[str]) -> int:
    """Check a folder. Return the exit code. Raises: ApolloError for what is no folder, or data that cannot be read."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    overrides, rest = split_overrides(arguments)
    options = _parse(rest)
    if not options.folder.is_dir():
        raise ConfigError(f"{options.folder} is not a folder", expected="a local model folder")

    from transformers.utils import logging as transformers_logging

    from apollo_sft.tools.handoff.checklist import check_folder, passes

    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the checks report what it would warn of
    try:
        results = check_folder(_subject(options, overrides))
    finally:
        transformers_logging.set_verbosity(verbosity)

    passed = passes(results)
    if options.json:
        checks = [asdict(result) for result in results]
        print(json.dumps({"folder": str(options.folder), "passed": passed, "checks": checks}, ensure_ascii=False))
    else:
        _show(Console(highlight=False), options, results, passed)
    if not passed:
        return 2
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="apollo-sft handoff", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--for", dest="reader")
    parser.add_argument("--max-new-tokens", type=int)
    for flag in ("--no-generate", "--trust-remote-code", "--json"):
        parser.add_argument(flag, action="store_true")

    return parser.parse_args(arguments)


def _subject(options: argparse.Namespace, overrides: list[str]) -> Subject:
    """Return the folder, with the run and the base model that it came from, as far as they are here."""
    from apollo_sft.checkpoint.run_folder.lookup import find_base, find_run, read_training
    from apollo_sft.config.sources import paths_of
    from apollo_sft.data.read.files import expand_paths
    from apollo_sft.tools.evaluate.questions import data_keys
    from apollo_sft.tools.handoff.against_base import names_of
    from apollo_sft.tools.handoff.readers import parse_reader
    from apollo_sft.tools.handoff.subject import Subject

    run = find_run(options.folder)
    composed = compose(["data.train_files=train.parquet", "data.val_files=null", *overrides])
    data = data_keys(options.folder, composed)
    # Files of the run are used where they still exist; missing files of --data are an error.
    if options.data:
        files = tuple(expand_paths(options.data, "--data"))
    else:
        files = tuple(file for file in paths_of(data.train_files) if run is not None and Path(file).is_file())

    base = None
    if run is not None:
        base = find_base(read_training(run)[1])

    reader = None
    if options.reader is not None:
        reader = parse_reader(options.reader)
    return Subject(
        folder=options.folder,
        data=data,
        run=run,
        base=base,
        of_base=names_of(base),
        files=files,
        trust_remote_code=options.trust_remote_code,
        generate=not options.no_generate,
        reader=reader,
        max_new_tokens=options.max_new_tokens,
    )


def _show(console: Console, options: argparse.Namespace, results: list[Result], passed: bool) -> None:
    folder = options.folder
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for result in results:
        table.add_row(result.check, Text(result.state, style=STYLES[result.state]), Text(result.what))
        if result.name is not None:
            table.add_row("", "", Text.assemble((result.name, "bold"), f": {result.fix}"))

    console.print(table)

    # Some checks open the folder by the installed transformers: their result may differ for the wanted reader.
    if options.reader is not None:
        by_library = [result for result in results if result.holds_for != "every version"]
        own = ", ".join(result.check for result in results if result not in by_library)
        theirs = ", ".join(result.check for result in by_library)
        console.print(f"\nFor {options.reader}: {own}.", soft_wrap=True)
        console.print(f"As {by_library[0].holds_for} reads the folder, which is installed: {theirs}.", soft_wrap=True)
    if passed:
        end = Text(f"\n{folder}: RL can start from this folder.", style="green")
    else:
        end = Text(f"\n{folder}: RL cannot start from this folder as it is.", style="bold red")

    console.print(end, soft_wrap=True)
