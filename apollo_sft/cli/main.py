"""`apollo-sft COMMAND …`: find the command and run it. Each command is a file of this folder."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys

from apollo_sft.errors import ApolloError, message_of

INTERRUPTED = 130
COMMANDS = {
    "train": "fine-tune a model on parquet files",
    "inspect": "show what a training would train on, token by token, without a GPU or weights",
    "plan": "what memory, steps and time a training takes, without a GPU, weights or data",
    "verify": "show that every layout of a training gives the same gradient",
    "export": "write the model of a checkpoint as a folder that RL, vLLM and transformers open",
    "handoff": "check what RL would read of a model folder",
    "report": "write one HTML page about one run or several",
    "eval": "let a model folder answer questions, and count the right answers",
    "workflow": "run a workflow file of AlphaApollo: its preparations, then its training",
    "store": "show the tokenised data that trainings keep, and remove some",
    "prepare": "make training files from GSM8K, math sets, tool conversations or data of your own",
    "demo": "train a small model from nothing, in about two minutes, and show what it learned",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Return the exit code: 0 done, 1 failed, 2 refused."""
    if arguments is None:
        arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"apollo-sft {importlib.metadata.version('apollo-sft')}")
        return 0

    name, *rest = arguments
    if name not in COMMANDS:
        print(f"apollo-sft: unknown command {name}{_hint(name)}", file=sys.stderr)
        return 2
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: model.external_lib may be in the working directory

    try:
        code: int = importlib.import_module(f"apollo_sft.cli.{name}").main(rest)
    except ApolloError as error:
        print(f"apollo-sft: {message_of(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("apollo-sft: interrupted", file=sys.stderr)
        return INTERRUPTED

    return code


def _hint(name: str) -> str:
    """Return what the user may have meant by a word that is no command."""
    if "=" in name:
        return f"; did you mean apollo-sft train {name} …?"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f"; there are {', '.join(COMMANDS)}"


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<8} {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(["apollo-sft COMMAND …", "", *lines, "", "apollo-sft COMMAND --help shows its options."])


if __name__ == "__main__":
    sys.exit(main())
