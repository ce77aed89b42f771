"""The program as a user starts it, in this process: its exit code and what it said."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
import transformers

from apollo_sft.__main__ import main


@dataclass(frozen=True)
class Ended:
    """`seconds`: of the processor. Those of the clock grow with what else the machine does."""

    code: int
    said: str
    seconds: float


class Entry:
    """Calls `main`. A weight that is read of a model is a failure: nothing that is refused may get so far."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd = capfd
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", _no_weights)

    def __call__(self, arguments: list[str]) -> Ended:
        self.capfd.readouterr()
        begun = time.process_time()
        code = main(arguments)
        seconds = time.process_time() - begun
        written = self.capfd.readouterr()
        return Ended(code, written.out + written.err, seconds)


def _no_weights(*_: Any, **__: Any) -> None:
    raise AssertionError("the weights were read")


def assert_refused(ended: Ended, *words: str) -> None:
    """One clear message and exit code 2."""
    assert "Traceback" not in ended.said, ended.said
    assert ended.code == 2, ended.said
    [message] = ended.said.split("apollo-sft: ")[1:]
    missing = [word for word in words if word not in message]
    assert not missing, message
