"""The flag that a signal sets, the end that it brings at once, and the process that ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apollo_sft.errors import Stopped
from apollo_sft.train.signals import SIGNALS, StopFlag

SHORT_TIMES = """
import os, signal, sys, time
from apollo_sft.train import signals
signals.GRACE_SECONDS = signals.SAME_REQUEST_SECONDS = 0.3
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SHORT_TIMES + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("number", SIGNALS)
def test_between_steps_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopFlag() as stop:
        stop.between_steps("training")
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_before_and_after_training_it_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=f"stopped by {number.name} while starting: no step was trained"), StopFlag():
        os.kill(os.getpid(), number)
    with StopFlag() as stop:
        stop.between_steps("training")
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=f"stopped by {number.name} while writing: it is kept"):
            stop.at_once("writing", "it is kept")
        os.kill(os.getpid(), number)  # it stops already: what it does on the way out is not disturbed


def test_at_the_end_it_does_nothing() -> None:
    with StopFlag() as stop:
        stop.never()
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_same_request_may_come_twice_and_a_second_one_ends_the_process() -> None:
    finished = run(
        "with signals.StopFlag() as stop:\n"
        "    stop.on_exit = lambda status: print(status, flush=True)\n"
        "    stop.between_steps('training')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(20)\n"
        "    print('not any more')\n"
    )
    assert finished.returncode == 128 + signal.SIGUSR1, finished.stderr
    assert finished.stdout == "still here\nfailed\n"


def test_a_main_thread_that_hears_nothing_is_ended() -> None:
    """As in a library that waits for another host: the handler of a signal would run when it comes back."""
    finished = run(
        "import ctypes, threading\n"
        "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)\n"
        "with signals.StopFlag() as stop:\n"
        "    stop.on_exit = lambda status: print(status, flush=True)\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    lock(mutex)\n"
        "    lock(mutex)\n"
    )
    assert finished.returncode == 75, finished.stderr
    assert finished.stdout == "preempted\n"


PARENT = """
import subprocess, sys, time
code = "import os, time; from apollo_sft.train.signals import end_with_parent; end_with_parent(); "
code += "print(os.getpid(), flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code]).wait()
"""


def test_a_process_ends_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """A zombie is not: whoever adopted it has only not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
