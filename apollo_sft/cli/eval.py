"""`apollo-sft eval`: let a model folder answer questions with known answers, and count the right ones."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apollo_sft.cli.arguments import Parser
from apollo_sft.config.compose import Composed, compose
from apollo_sft.errors import ConfigError

if TYPE_CHECKING:
    from apollo_sft.tools.evaluate.questions import Answered, Exam

HELP = """apollo-sft eval DIR FILE.parquet … [options] [data.key=value …]

Lets the model of a folder answer the questions of parquet files, greedily, and compares final answers: what follows
#### on its line, or is inside \\boxed{…}. The truth is reward_model.ground_truth where the file has that column, else
the final answer in the response.

Columns are named by the keys of a training (data.prompt_key, data.prompt_dict_keys, data.response_key,
data.multiturn.enable, …). Without them: as the run was trained that wrote DIR, if the file has those columns; else the
usual ones.

  --limit N           the first N rows only
  --batch-size N      prompts at once [32]
  --max-new-tokens N  the longest reply [512]
  --engine NAME       transformers, vllm, or auto: vllm where it is installed and there is a GPU [auto]
  --out FILE          where all generations go, one JSON line a row [generations.jsonl]
  --examples N        how many to show [6]
  --json              print the result as one JSON object, and nothing else
  --help              this text

Exit codes: 0 done, however many are right; 2 refused."""
OVERRIDE = re.compile(r"\+{0,2}[a-z_]+(\.[a-z_]+)*=(?!=)")
"""`key=value`, but not `package==version`."""
SHOWN_CHARACTERS = 60


def main(arguments: list[str]) -> int:
    """Evaluate a model folder. Return the exit code. Raises: ApolloError for what cannot be read."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    overrides, rest = split_overrides(arguments)
    options = _parse(rest)
    # Keys need values that a config requires; the files come from the command line.
    composed = compose(["data.train_files=questions.parquet", "data.val_files=null", *overrides])
    folder = Path(options.folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no model folder", found="no config.json", expected="a Hugging Face folder")
    if not options.out.absolute().parent.is_dir() or options.out.is_dir():
        raise ConfigError(f"--out {options.out} cannot be written", expected="a file in a folder that exists")

    # Everything that can be refused is refused by now: generating may take hours.
    exam = _examine(folder, options, composed)
    write_generations(options.out, exam.answered)
    if options.json:
        print(json.dumps(_figures(exam)))
    else:
        _show(Console(highlight=False), exam, options)

    return 0


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return `key=value` arguments as a training takes them, and the rest."""
    overrides = [argument for argument in arguments if OVERRIDE.match(argument)]
    return overrides, [argument for argument in arguments if not OVERRIDE.match(argument)]


def write_generations(path: Path, answered: Iterable[Answered]) -> None:
    """Write one JSON line for each reply."""
    with path.open("w", encoding="utf-8") as file:
        for one in answered:
            file.write(json.dumps(one.record(), ensure_ascii=False) + "\n")


def shown(answer: str, right: bool) -> Text:
    """Return an answer in one line, and whether it is right."""
    verdict = ("  wrong", "red")
    if right:
        verdict = ("  right", "green")
    return Text.assemble(one_line(answer), verdict)


def one_line(text: str) -> str:
    """Return a text in one line of at most 60 characters: line breaks become `/`, a long text is cut in its middle."""
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip()) or "(blank)"
    if len(line) <= SHOWN_CHARACTERS:
        return line
    half = SHOWN_CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="apollo-sft eval", add_help=False, allow_abbrev=False)
    parser.add_argument("folder")
    parser.add_argument("files", nargs="+")
    for flag, default in (("--limit", -1), ("--batch-size", 32), ("--max-new-tokens", 512), ("--examples", 6)):
        parser.add_argument(flag, type=int, default=default)

    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("generations.jsonl"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.max_new_tokens < 1 or options.limit == 0 or options.limit < -1:
        parser.error("--limit, --batch-size and --max-new-tokens must be at least 1")
    return options


def _examine(folder: Path, options: argparse.Namespace, composed: Composed) -> Exam:
    """Read the questions, and let the model answer them."""
    from transformers.utils import logging as transformers_logging

    from apollo_sft.data.read.files import expand_paths
    from apollo_sft.data.read.rows import column_names
    from apollo_sft.tools.evaluate.questions import Settings, data_keys, fitting_keys, read_questions, take_exam

    transformers_logging.disable_progress_bar()
    files = expand_paths(options.files, "FILE")
    data = data_keys(folder, composed)
    # Columns that the user has named are used, even where the file has usual ones.
    keys = {"data.prompt_key", "data.multiturn.enable", "data.multiturn.messages_key"} & set(composed.overridden)
    if not keys:
        data = fitting_keys(data, column_names(files[0]))

    questions = read_questions(files, data, options.limit)
    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        engine=options.engine,
        template_kwargs=dict(data.apply_chat_template_kwargs),
        trust_remote_code=composed.config.model.trust_remote_code,
    )

    with Console(stderr=True).status(f"0 of {len(questions):,} questions") as status:

        def progress(done: int) -> None:
            status.update(f"{done:,} of {len(questions):,} questions")

        return take_exam(str(folder), questions, settings, progress)


def _figures(exam: Exam) -> dict[str, Any]:
    """Return the figures of `--json`."""
    from apollo_sft.model.generate import interval

    total = len(exam.answered)
    return {
        "rows": total,
        "right": exam.num_right,
        "accuracy": exam.num_right / total,
        "interval": list(interval(exam.num_right, total)),
        "stopped": exam.num_stopped / total,
        "tokens": exam.num_tokens,
        "tokens_per_second": exam.num_tokens / max(exam.seconds, 1e-9),
        "engine": exam.engine,
    }


def _show(console: Console, exam: Exam, options: argparse.Namespace) -> None:
    figures = _figures(exam)
    table = Table(box=None, pad_edge=False)
    table.add_column("row", overflow="fold", style="dim")
    for name in ("question", "truth", "answer", "reply"):
        table.add_column(name, overflow="fold")

    for one in _some(exam.answered, options.examples):
        record = one.record()
        question = one_line(one.question.messages[-1]["content"])
        extracted = record["extracted"]
        if extracted is None:
            extracted = "none"
        style = "red"
        if one.right:
            style = "green"
        answer = Text(one_line(extracted), style=style)
        reply = one_line(one.reply.text)
        table.add_row(str(record["row"]), Text(question), Text(one_line(record["truth"])), answer, Text(reply))

    console.print(table)

    low, high = (100 * bound for bound in figures["interval"])
    lines = [
        f"right           {figures['right']:,} of {figures['rows']:,}: {100 * figures['accuracy']:.1f} %, "
        f"95 % interval {low:.1f} to {high:.1f} %",
        f"stopped         {100 * figures['stopped']:.1f} %: ended by a stop token of generation_config.json",
        f"speed           {figures['tokens_per_second']:,.0f} tokens a second, by {figures['engine']}",
        f"all generations {options.out}",
    ]
    console.print("\n" + "\n".join(lines), soft_wrap=True, markup=False)


def _some(answered: Sequence[Answered], number: int) -> list[Answered]:
    """Return half right and half wrong ones, as far as there are, in the order of the file."""
    right = [one for one in answered if one.right]
    wrong = [one for one in answered if not one.right]
    of_right = min(len(right), max(number // 2, number - len(wrong)))
    chosen = {id(one) for one in (*right[:of_right], *wrong[: number - of_right])}
    return [one for one in answered if id(one) in chosen]
