import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging

from apollo_sft.report.log import say, setup_logging, warn
from tests.support.terminal import on_terminal

LONG = 'AutoModelForCausalLM.from_pretrained("/home/someone/' + "a-long-folder/" * 12 + '")'


@pytest.fixture(autouse=True)
def _restore_libraries() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
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


def test_importing_does_no_work() -> None:
    code = (
        "import logging, sys; import apollo_sft.report.log, apollo_sft.report.sinks, apollo_sft.report.console;"
        "assert not logging.getLogger('apollo_sft').handlers;"
        "loaded = {'torch', 'transformers', 'wandb', 'tensorboard'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
