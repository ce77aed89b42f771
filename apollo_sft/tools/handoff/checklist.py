"""Whether RL can go on from a model folder: every check in order, each with a name for what is wrong.

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
from apollo_sft.tools.handoff.model_files import Subject, WrongError

State = Literal["pass", "note", "wrong", "skipped", "not checked"]


@dataclass(frozen=True, slots=True)
class Check:
    """`run`: what is done. `needs`: checks that must not have found anything wrong before. `by_library`: what it finds
    is what the installed transformers makes of the folder; the others read files, and hold for every version."""

    run: Callable[[Subject], str | None]
    needs: tuple[str, ...] = ()
    by_library: bool = False


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
    """`name`: of what is wrong or worth a note, as docs/handoff.md lists it. `fix`: what to do. `holds_for`: the reader
    that the check speaks of, "every version" or the installed one."""

    check: str
    state: State
    what: str
    name: str | None = None
    fix: str | None = None
    holds_for: str = "every version"


def check_folder(subject: Subject) -> list[Result]:
    """All checks. One that needs what another found wrong is not made.

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
        results.append(replace(found, holds_for=installed) if check.by_library else found)
    return results


def passes(results: list[Result]) -> bool:
    return all(result.state not in ("wrong", "not checked") for result in results)


def _made(name: str, check: Callable[[Subject], str | None], subject: Subject) -> Result:
    try:
        what = check(subject)
    except WrongError as wrong:
        return Result(name, "note" if wrong.is_note else "wrong", wrong.what, wrong.name, wrong.fix)
    return Result(name, "pass", what) if what is not None else Result(name, "skipped", "not wanted")
