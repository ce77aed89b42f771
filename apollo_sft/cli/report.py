"""`apollo-sft report`: write one HTML file about one run or several."""

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
plot each, how they ended, and the keys that differ. The page needs no network, no script and no other file. It also
works for a run that is not finished, or has failed.

  -o, --output FILE  where to write it [apollo-report.html]
  --no-samples       leave the trained samples out: they need the tokenised data and the tokenizer
  --help             this text

Exit codes: 0 done, 1 a file cannot be read, 2 refused: a folder is not that of a run."""


def main(arguments: list[str]) -> int:
    """Write the report. Return the exit code. Raises: ApolloError."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    parser = Parser(prog="apollo-sft report", add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, default=Path("apollo-report.html"))
    parser.add_argument("--no-samples", action="store_true")
    options = parser.parse_args(arguments)

    # Before the work: reading many runs takes a while.
    if options.output.is_dir() or not options.output.absolute().parent.is_dir():
        raise ConfigError(f"{options.output} cannot be written", expected="a file in a folder that exists")

    from apollo_sft.report.page import html
    from apollo_sft.report.run_document import document
    from apollo_sft.report.run_files import read_runs

    runs = read_runs(list(dict.fromkeys(options.folders)))
    # Samples of several runs are not comparable: a page of several has none.
    trained = None
    if len(runs) == 1 and not options.no_samples:
        trained = _trained_samples(runs[0])

    options.output.write_text(html(document(runs, trained)), encoding="utf-8")
    if len(runs) == 1:
        print(f"{options.output}: the run as a page")
    else:
        print(f"{options.output}: {len(runs)} runs as a page")

    return 0


def _trained_samples(run: RunRecord) -> Passages | None:
    from apollo_sft.tools.inspect.run_samples import trained_samples

    return trained_samples(run.folder, run.audit.get("train", {}), run.config)
