import re

import pytest

from apollo_sft.report.console import RATE_WINDOW, Console, Eta, clock
from apollo_sft.report.log import say, setup_logging
from apollo_sft.report.metrics import Record, StepFacts, train_record, val_record
from tests.support.terminal import on_terminal

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def record(step: int, seconds: float = 0.5, targets: int = 1234) -> Record:
    facts = StepFacts(
        step=step,
        loss=1.23456,
        grad_norm=2.314,
        lr=1e-5,
        targets=targets,
        tokens=6172,
        step_seconds=seconds,
        epoch=step / 100,
        peak_bytes=2**30,
    )
    return train_record(facts)


def lines_of(console: Console, records: list[Record], capsys: pytest.CaptureFixture[str]) -> list[str]:
    setup_logging(is_main=True)
    for one in records:
        console.step(one)
    console.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_plain_line_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(Console(900, 1, enabled=True), [record(1)], capsys)
    assert lines == ["step   1/900  loss 1.2346  lr 1.0e-05  grad norm 2.31  targets 1,234  12,344 tok/s  eta 7:30"]


def test_columns_keep_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(9, targets=1234), record(10, targets=7)]
    first, second = lines_of(Console(900, 1, enabled=True), records, capsys)
    for word in ("loss", "lr", "grad", "targets", "tok/s", "eta"):
        assert first.index(word) == second.index(word)


def test_plain_lines_come_every_log_freq_steps_and_at_both_ends(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(Console(11, 4, enabled=True), [record(step) for step in range(1, 12)], capsys)
    assert [line.split("/")[0].split()[1] for line in lines] == ["1", "4", "8", "11"]


def test_validation_has_a_line_of_its_own_whatever_log_freq_is(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[Record] = [{"step": 0} | val_record(2.0, 45678), record(3) | val_record(1.5, 45678)]
    lines = lines_of(Console(10, 100, enabled=True), records, capsys)
    assert lines == [
        "step  0/10  validation loss 2.0000 (45,678 targets)",
        "step  3/10  validation loss 1.5000 (45,678 targets)",
    ]


def test_a_console_that_is_not_wanted_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(Console(10, 1, enabled=False), [record(1) | val_record(2.0, 3)], capsys) == []


def test_a_terminal_shows_bar_place_and_numbers_whole_in_80_columns() -> None:
    with on_terminal() as screen:
        setup_logging(is_main=True)
        console = Console(12345, 1, enabled=True)
        console.step(record(10000, seconds=60.0, targets=1_234_567))
        console.close()
    shown = ESCAPES.sub("", screen.text()).splitlines()
    assert "━" * 30 in shown[-2]
    assert shown[-2].rstrip().endswith("step 10000/12345  eta 39:05:00")
    assert shown[-1].rstrip() == "loss 1.2346  lr 1.0e-05  grad norm 2.31  targets 1,234,567  103 tok/s"


def test_lines_said_while_the_bar_is_alive_stand_above_it() -> None:
    with on_terminal() as screen:
        setup_logging(is_main=True)
        console = Console(10, 1, enabled=True)
        console.step(record(1))
        say("said in between")
        console.step(record(2) | val_record(1.5, 45))
        console.close()
        say("said afterwards")
    shown = [line.rstrip() for line in ESCAPES.sub("", screen.text()).replace("\r", "\n").splitlines()]
    assert shown.count("said in between") == 1
    assert shown.count("step  2/10  validation loss 1.5000 (45 targets)") == 1
    assert shown[-3].endswith("step  2/10  eta 0:04")
    assert shown[-2].startswith("loss 1.2346")
    assert shown[-1] == "said afterwards"


def test_the_cursor_comes_back() -> None:
    with on_terminal() as screen:
        setup_logging(is_main=True)
        Console(10, 1, enabled=True).close()
    text = screen.text()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("first", [1, 500])
def test_the_first_step_of_a_process_does_not_spoil_the_estimate(first: int) -> None:
    eta = Eta(first + 9)
    eta.add(100.0)
    assert eta.seconds_left(first) == 900.0
    eta.add(2.0)
    assert eta.seconds_left(first + 1) == 16.0
    eta.add(4.0)
    assert eta.seconds_left(first + 2) == 21.0


def test_the_estimate_follows_a_change_of_pace() -> None:
    eta = Eta(1000)
    for _ in range(100):
        eta.add(10.0)
    for _ in range(RATE_WINDOW):
        eta.add(1.0)
    assert eta.seconds_left(150) == 850.0


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (5025, "1:23:45")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
