"""Whether RL can go on from a model folder: every check in order, each with a name for what is wrong.

Training does not come here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from apollo_sft.train import handoff_base as base
from apollo_sft.train import handoff_files as files
from apollo_sft.train import handoff_prompts as prompts
from apollo_sft.train.handoff_files import Subject, WrongError

State = Literal["pass", "note", "wrong", "skipped", "not checked"]
Check = Callable[[Subject], str | None]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "form": (files.check_form, ()),
    "files": (files.check_files, ()),
    "config": (files.check_config, ("files",)),
    "weights": (files.check_weights, ("files",)),
    "names": (files.check_names, ("config", "weights")),
    "base": (base.check_base, ("names",)),
    "dtype": (files.check_dtype, ("config", "weights")),
    "tokenizer": (prompts.check_tokenizer, ("config",)),
    "template": (prompts.check_template, ("tokenizer",)),
    "stops": (prompts.check_stops, ("template",)),
    "generation": (prompts.check_generation, ("form", "names", "dtype", "stops")),
}
"""Name: what it does, and which ones must not have found anything wrong before."""


@dataclass(frozen=True, slots=True)
class Result:
    """`name`: of what is wrong or worth a note, as docs/handoff.md lists it. `fix`: what to do."""

    check: str
    state: State
    what: str
    name: str | None = None
    fix: str | None = None


def check_folder(subject: Subject) -> list[Result]:
    """All checks. One that needs what another found wrong is not made.

    Raises: DataError for data that cannot be read.
    """
    results: list[Result] = []
    for name, (check, needs) in CHECKS.items():
        bad = {result.check for result in results if result.state in ("wrong", "not checked")}
        if bad & set(needs):
            results.append(Result(name, "not checked", f"needs {', '.join(sorted(bad & set(needs)))}"))
        else:
            results.append(_made(name, check, subject))
    return results


def passes(results: list[Result]) -> bool:
    return all(result.state not in ("wrong", "not checked") for result in results)


def _made(name: str, check: Check, subject: Subject) -> Result:
    try:
        what = check(subject)
    except WrongError as wrong:
        return Result(name, "note" if wrong.is_note else "wrong", wrong.what, wrong.name, wrong.fix)
    return Result(name, "pass", what) if what is not None else Result(name, "skipped", "not wanted")
