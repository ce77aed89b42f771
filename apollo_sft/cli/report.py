"""`apollo-sft report`: what became of one run or several, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from apollo_sft.cli.arguments import Parser
from apollo_sft.errors import ConfigError

if TYPE_CHECKING:
    from apollo_sft.report.document import Passages
    from apollo_sft.report.run_files import RunRecord

HELP = """apollo-sft report DIR … [options]

Writes one page about the run in DIR: its curves with validation, learning rate, gradient norm, throughput and memory;
the data; samples; replies of trainer.generate_samples; the configuration. Of two runs and more: their curves in one
plot each, how they ended, and the keys that differ. The page needs no network, no script and no other file. A run that
goes on, or has failed, can be looked at as well.

  -o, --output FILE  where to write it [apollo-report.html]
  --no-samples       leave the trained samples out: they need the tokenised data and the tokenizer
  --help             this text

Exit codes: 0 done, 1 a file cannot be read, 2 refused: a folder is not that of a run."""


def main(arguments: list[str]) -> int:
    """Returns the exit code. Raises: ApolloError."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    parser = Parser(prog="apollo-sft report", add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, default=Path("apollo-report.html"))
    parser.add_argument("--no-samples", action="store_true")
    options = parser.parse_args(arguments)
    if options.output.is_dir() or not options.output.absolute().parent.is_dir():
        raise ConfigError(f"{options.output} cannot be written", expected="a file in a folder that exists")
    from apollo_sft.report.page import html
    from apollo_sft.report.run_document import document
    from apollo_sft.report.run_files import read_runs

    runs = read_runs(list(dict.fromkeys(options.folders)))
    trained = None if options.no_samples or len(runs) > 1 else _trained_samples(runs[0])
    options.output.write_text(html(document(runs, trained)), encoding="utf-8")
    print(f"{options.output}: {'the run' if len(runs) == 1 else f'{len(runs)} runs'} as a page")
    return 0


def _trained_samples(run: RunRecord) -> Passages | None:
    from apollo_sft.tools.inspect.run_samples import trained_samples

    return trained_samples(run.folder, run.audit.get("train", {}), run.config)
