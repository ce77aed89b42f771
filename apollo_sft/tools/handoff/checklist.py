"""Check whether RL can train a model folder further: every check in order, each with a name for what is wrong.

Training does not come here.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from apollo_sft.tools.handoff import against_base as base
from apollo_sft.tools.handoff import model_files as files
from apollo_sft.tools.handoff import prompts, readers
from apollo_sft.tools.handoff.subject import Subject, WrongError

State = Literal["pass", "note", "wrong", "skipped", "not checked"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    run: Callable[[Subject], str | None]

    needs: tuple[str, ...] = ()
    """Checks that must have passed before."""

    by_library: bool = False
    """The result depends on the installed transformers. The others read files, and hold for every version."""


CHECKS: dict[str, Check] = {
    "form": Check(files.check_form),
    "files": Check(files.check_files),
    "config": Check(files.check_config, ("files",), by_library=True),
    "weights": Check(files.check_weights, ("files",)),
    "names": Check(files.check_names, ("config", "weights"), by_library=True),
    "base": Check(base.check_base, ("names",)),
    "dtype": Check(files.check_dtype, ("config", "weights")),
    "readers": Check(readers.check_readers, ("config", "weights", "names")),
    "tokenizer": Check(prompts.check_tokenizer, ("config",), by_library=True),
    "template": Check(prompts.check_template, ("tokenizer",), by_library=True),
    "stops": Check(prompts.check_stops, ("template",), by_library=True),
    "generation": Check(prompts.check_generation, ("form", "names", "dtype", "stops"), by_library=True),
}


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one check."""

    check: str
    state: State
    what: str

    name: str | None = None
    """The name of what is wrong or worth a note, as docs/handoff.md lists it."""

    fix: str | None = None
    """What to do."""

    holds_for: str = "every version"
    """The versions of transformers that it holds for: all, or the installed one."""


def check_folder(subject: Subject) -> list[Result]:
    """Run all checks. One that needs another check that failed is not run.

    Raises: DataError for data that cannot be read.
    """
    results: list[Result] = []
    installed = f"transformers {importlib.metadata.version('transformers')}"
    for name, check in CHECKS.items():
        bad = {result.check for result in results if result.state in ("wrong", "not checked")}
        if bad & set(check.needs):
            found = Result(name, "not checked", f"needs {', '.join(sorted(bad & set(check.needs)))}")
        else:
            found = _made(name, check.run, subject)
        if check.by_library:
            found = replace(found, holds_for=installed)
        results.append(found)

    return results


def passes(results: list[Result]) -> bool:
    """Return whether no check found anything wrong."""
    return all(result.state not in ("wrong", "not checked") for result in results)


def _made(name: str, check: Callable[[Subject], str | None], subject: Subject) -> Result:
    try:
        what = check(subject)
    except WrongError as wrong:
        state: State = "wrong"
        if wrong.is_note:
            state = "note"
        return Result(name, state, wrong.what, wrong.name, wrong.fix)

    if what is None:
        return Result(name, "skipped", "not wanted")
    return Result(name, "pass", what)
