"""`kill -9` of one rank, of all ranks, or of the launcher, at random moments; the same command again finishes the run.

It must be bit-equal to the run that was never stopped. Half of the kills wait until a checkpoint is being written.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from apollo_sft.checkpoint import publish
from tests.support import python
from tests.support.interrupted import DROPOUT, KINDS, differences
from tests.support.processes import descendants, kill, ranks, wait_until_gone
from tests.support.reliability import record
from tests.support.runs import arguments, write_inputs

STEPS = 8
SEED = int(os.environ.get("APOLLO_KILLS_SEED", "1"))
TRIALS = int(os.environ.get("APOLLO_KILLS", "50"))
PATIENCE_SECONDS = 120
"""How long a job may live on after it lost a rank or its launcher, and how long a training may take to begin."""
LARGER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
"""So that a checkpoint takes long enough to be hit."""


@dataclass(frozen=True)
class Plan:
    """One trial. `victim`: one, all (ranks) or launcher."""

    number: int
    processes: int
    kind: str
    in_background: bool
    victim: str
    in_save: bool

    @property
    def keys(self) -> list[str]:
        return [
            f"trainer.total_training_steps={STEPS}",
            "trainer.save_freq=2",
            "trainer.test_freq=3",
            "trainer.max_ckpt_to_keep=1",
            f"trainer.checkpoint.async_save={str(self.in_background).lower()}",
            *KINDS[self.kind],
        ]

    def __str__(self) -> str:
        how = "asynchronous" if self.in_background else "synchronous"
        when = "in a save" if self.in_save else "at any time"
        return f"{self.number}: {self.processes} ranks, {self.kind}, {how}; {self.victim} {when}"


@dataclass
class Outcome:
    """`hit_a_save`: the killed process left an unfinished checkpoint. `died_seconds`: until no process was left."""

    plan: Plan
    kills: int = 0
    hit_a_save: bool = False
    died_seconds: float = 0.0
    resumed_seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        times = f"all gone after {self.died_seconds:.1f} s, finished after {self.resumed_seconds:.1f} s"
        return f"{self.plan}: {self.kills} kills, {times}; {self.wrong or 'bit-equal'}"


def plans(trials: int) -> list[Plan]:
    """Every other one in a save; of those and of the others every other one in the background, and so on."""
    made = []
    for number in range(trials):
        in_save, in_background = number % 2 == 0, number // 2 % 2 == 0
        processes, kind = 1 + number // 4 % 2, "LoRA" if number % 5 == 4 else "plain"
        made.append(Plan(number, processes, kind, in_background, ("one", "all", "launcher")[number % 3], in_save))
    return made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), **DROPOUT, **LARGER)


@pytest.fixture(scope="module")
def references(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(inputs, tmp_path_factory.mktemp("references"))


class References:
    """The runs that were never stopped, each made when it is first asked for."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self._inputs, self._folder = inputs, folder

    def of(self, plan: Plan) -> Path:
        out = self._folder / f"{plan.processes} {plan.kind}"
        if not out.exists():
            process = start(self._inputs, out, plan)
            code = process.wait(timeout=600)
            assert code == 0, said(process)
        return out


def start(inputs: Path, out: Path, plan: Plan) -> subprocess.Popen[bytes]:
    words = arguments(inputs, out, *plan.keys)
    command = [sys.executable, "-m", "apollo_sft.cli.main", "train", f"--nproc={plan.processes}", *words]
    log = out.with_suffix(".log").open("ab")
    try:
        return python.start(command, stdout=log, stderr=log, start_new_session=True)
    finally:
        log.close()


def said(process: subprocess.Popen[bytes]) -> str:
    words = [word for word in process.args if "default_local_dir=" in word]  # type: ignore[union-attr]
    return Path(words[0].partition("=")[2]).with_suffix(".log").read_text()[-3000:]


def is_saving(out: Path) -> bool:
    return any((out / "checkpoints").glob(f"{publish.STAGING_PREFIX}step_*"))


def wait_for_the_moment(process: subprocess.Popen[bytes], out: Path, plan: Plan, chance: random.Random) -> bool:
    """Until it is time to kill. False when the run had ended before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    steps = chance.randrange(0, STEPS)
    wanted = out / "metrics.jsonl"
    while True:
        lines = wanted.read_bytes().count(b"\n") if wanted.is_file() else 0
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        if lines >= steps and (not plan.in_save or is_saving(out)):
            break
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.02 if plan.in_save else 0.1) if steps else chance.uniform(0, 3))
    return process.poll() is None


def strike(process: subprocess.Popen[bytes], plan: Plan, chance: random.Random) -> list[int]:
    """Kill whom the plan names; returns all processes of the job."""
    everybody = [process.pid, *descendants(process.pid)]
    training = ranks(process.pid) or {0: process.pid}
    launchers = [pid for pid in everybody if pid not in training.values()]
    victims = {
        "one": [training[chance.choice(sorted(training))]],
        "all": list(training.values()),
        "launcher": [chance.choice(launchers or [process.pid])],
    }[plan.victim]
    kill(victims)
    return everybody


def try_kill(inputs: Path, folder: Path, reference: Path, plan: Plan) -> Outcome:
    """Start, kill, and so on, until a kill was where the plan wants it; then start once more and let it finish."""
    chance = random.Random(SEED * 1000 + plan.number)
    outcome, out = Outcome(plan), folder / "out"
    for _ in range(8):
        process = start(inputs, out, plan)
        if not wait_for_the_moment(process, out, plan, chance):
            process.wait(timeout=PATIENCE_SECONDS)
            shutil.rmtree(out, ignore_errors=True)  # too late: it had finished
            continue
        saving = is_saving(out)
        everybody = strike(process, plan, chance)
        outcome.kills += 1
        began = time.monotonic()
        left = end(process, everybody)
        outcome.died_seconds = max(outcome.died_seconds, time.monotonic() - began)
        if left:
            outcome.wrong.append(f"processes {left} lived on for {PATIENCE_SECONDS} s")
        outcome.hit_a_save |= saving and is_saving(out)
        if outcome.hit_a_save or not plan.in_save:
            break
    began = time.monotonic()
    process = start(inputs, out, plan)
    code = process.wait(timeout=600)
    outcome.resumed_seconds = time.monotonic() - began
    outcome.wrong += [f"exit code {code}: {said(process)}"] if code else differences(out, reference)
    if plan.in_save and not outcome.hit_a_save:
        outcome.wrong.append("no kill met a save")
    return outcome


def end(process: subprocess.Popen[bytes], everybody: list[int]) -> list[int]:
    """Wait until the job has ended by itself; those that did not, which are ended then."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    left = wait_until_gone(everybody, max(0.0, deadline - time.monotonic()))
    kill(left)
    process.wait(timeout=30)
    return left


def check(name: str, inputs: Path, tmp_path: Path, references: References, chosen: list[Plan]) -> None:
    outcomes = []
    for plan in chosen:
        folder = tmp_path / str(plan.number)
        folder.mkdir()
        outcome = try_kill(inputs, folder, references.of(plan), plan)
        outcomes.append(outcome)
        print(outcome, flush=True)
        if not outcome.wrong:
            shutil.rmtree(folder)
    bad = [outcome for outcome in outcomes if outcome.wrong]
    worst = max(outcome.died_seconds for outcome in outcomes)
    record(name, trials=len(outcomes), failures=len(bad), worst_seconds=worst)
    assert not bad, "\n".join(f"{outcome.plan}: {outcome.wrong}" for outcome in bad)
    assert sum(outcome.hit_a_save for outcome in outcomes) >= len(outcomes) // 2


def test_a_few_kills(inputs: Path, tmp_path: Path, references: References) -> None:
    few = [
        Plan(100, 1, "plain", True, "one", True),
        Plan(101, 2, "LoRA", True, "launcher", False),
    ]
    check("kill -9 at a random moment, then the same command again (a few)", inputs, tmp_path, references, few)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_many_kills(inputs: Path, tmp_path: Path, references: References) -> None:
    name = "kill -9 of a rank, all ranks or the launcher, half of them in a save, then the same command again"
    check(name, inputs, tmp_path, references, plans(TRIALS))
