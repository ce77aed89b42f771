import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from apollo_sft.report.log import say, setup_logging, warn
from tests.support.terminal import on_terminal

LONG = 'AutoModelForCausalLM.from_pretrained("/home/someone/' + "a-long-folder/" * 12 + '")'


@pytest.fixture(autouse=True)
def _restore_libraries() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()  # as a process begins, whatever ran in this one before
    with warnings.catch_warnings():
        yield
    transformers_logging.set_verbosity(before)


def test_rank_0_speaks_on_stderr_and_leaves_stdout_free(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(is_main=True)
    say("tokenised [7,473] rows")
    warn("one step an epoch")
    assert capsys.readouterr() == ("", "tokenised [7,473] rows\nwarning: one step an epoch\n")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(is_main=False)
    say("hello")
    warn("look")
    transformers_logging.get_logger("transformers.modeling_utils").warning("some weights are new")
    assert capsys.readouterr() == ("", "")


def test_a_second_setup_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(is_main=True)
    setup_logging(is_main=True)
    say("once")
    transformers_logging.get_logger("transformers.modeling_utils").warning("once too")
    assert capsys.readouterr().err == "once\ntransformers: once too\n"


def test_warnings_of_transformers_are_shown_and_its_advice_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    setup_logging(is_main=True)
    library = transformers_logging.get_logger("transformers.modeling_utils")
    library.warning("some weights are new")
    library.warning_advice("you should rather call __call__")
    assert capsys.readouterr().err == "transformers: some weights are new\n"


def test_progress_bars_of_libraries_are_off_without_a_terminal() -> None:
    transformers_logging.enable_progress_bar()
    setup_logging(is_main=True)
    assert not transformers_logging.is_progress_bar_enabled()


def test_progress_bars_of_libraries_stay_on_in_a_terminal_on_rank_0_only() -> None:
    transformers_logging.enable_progress_bar()
    with on_terminal():
        setup_logging(is_main=True)
        assert transformers_logging.is_progress_bar_enabled()
        setup_logging(is_main=False)
        assert not transformers_logging.is_progress_bar_enabled()


def test_long_lines_are_whole_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(is_main=True)
    say(LONG)
    assert capsys.readouterr().err == LONG + "\n"


def test_long_lines_are_whole_in_a_terminal_too() -> None:
    with on_terminal() as screen:
        setup_logging(is_main=True)
        say(LONG)
    assert screen.text() == LONG + "\n"


def test_colours_reach_a_terminal() -> None:
    with on_terminal() as screen:
        setup_logging(is_main=True)
        say("\x1b[32manswer\x1b[0m")
    assert screen.text() == "\x1b[32manswer\x1b[0m\n"


def test_colours_are_taken_out_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(is_main=True)
    say("\x1b[32manswer\x1b[0m")
    assert capsys.readouterr().err == "answer\n"


def said_after(first: str) -> str:
    """What a process does that says `first` lines, waits for a line on stdin, and says more; it ends with `whole`."""
    return (
        "import sys\n"
        "from apollo_sft.report.console import Console\n"
        "from apollo_sft.report.log import say, setup_logging\n"
        "setup_logging(is_main=True); console = Console(10, 1, enabled=True)\n"
        f"for number in range({first}): say(f'line {{number}}')\n"
        "sys.stdin.readline()\n"
        "for number in range(1000): say('nobody reads this')\n"
        "console.close(); sys.stderr.write('nor this'); sys.stderr.flush(); print('whole')"
    )


def test_a_run_goes_on_when_its_reader_has_seen_enough() -> None:
    """As in `2>&1 | head`."""
    with subprocess.Popen(
        [sys.executable, "-c", said_after("2")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        assert [process.stderr.readline() for _ in range(2)] == ["line 0\n", "line 1\n"]
        process.stderr.close()
        process.stdin.write("go on\n")
        process.stdin.close()
        assert process.stdout.read() == "whole\n"
    assert process.returncode == 0


def test_a_run_goes_on_when_its_terminal_is_closed() -> None:
    reader, writer = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", said_after("0")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        assert process.stdin and process.stdout
        os.close(writer)
        assert os.read(reader, 6) == b"\x1b[?25l"  # the bar is alive
        os.close(reader)
        process.stdin.write("go on\n")
        process.stdin.close()
        assert process.stdout.read() == "whole\n"
    assert process.returncode == 0


def test_a_run_goes_on_when_its_log_is_full() -> None:
    code = "from apollo_sft.report.log import say, setup_logging; setup_logging(True); say('x'); print('whole')"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.stdout == "whole\n"


def test_markup_and_emoji_codes_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = "data.prompt_dict_keys=[question] [bold]no[/bold] :smile: ⟦answer⟧ https://a.b 'c' 1,234"
    setup_logging(is_main=True)
    say(text)
    assert capsys.readouterr().err == text + "\n"
    with on_terminal() as screen:
        setup_logging(is_main=True)
        say(text)
    assert screen.text() == text + "\n"


def test_importing_does_no_work() -> None:
    code = (
        "import logging, sys; import apollo_sft.report.log, apollo_sft.report.sinks, apollo_sft.report.console;"
        "assert not logging.getLogger('apollo_sft').handlers;"
        "loaded = {'torch', 'transformers', 'wandb', 'tensorboard'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
