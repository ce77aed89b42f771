"""A chat template is a stranger's program: it is ended in seconds, and reaches nothing but what it is given."""

import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from apollo_sft.data.read.conversation import Conversation
from apollo_sft.data.render import limits as render_limits
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.sandbox import RunawayError, Sandbox
from apollo_sft.data.render.template import ChatTemplate, resolve_template
from apollo_sft.errors import DataError
from apollo_sft.types import RowRef
from tests.support import python
from tests.support.data import CHATML, chat, data_config, tiny_tokenizer
from tests.support.reliability import record

SLOWEST_SECONDS = 60
"""By the clock, on a busy machine; `MAX_SECONDS` counts CPU time."""
TICK_SECONDS = 0.4
"""Two of them pass until a rendering is ended."""
LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
GROWING = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "endless loops": (LOOPS, "still running"),
    "a number that grows": (GROWING.replace("START", "9").replace("OP", "*"), "still running|digits"),
    "a text that grows": (GROWING.replace("START", "'a'").replace("OP", "~"), "MiB of memory"),
    "a list that grows": (GROWING.replace("START", "[1]").replace("OP", "+"), "MiB of memory"),
    "a huge text": ("{{ messages[0].content * 10000000000 }}", "MiB of memory"),
    "a huge constant": ("{{ 'a' * 10000000000 }}", "MiB of memory"),
    "a huge field": ("{{ '%1000000000000d' % messages|length }}", "MiB of memory"),
    "a long output": ("{{ messages[0].content * 40000000 }}", "characters; at most"),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "too many brackets": (f"{{{{ {'(' * 5000}1{')' * 5000} }}}}", "RecursionError"),
    "too many blocks": ("{% for a in [1] %}" * 110 + "{% endfor %}" * 110, "indentation|RecursionError|nested"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a module": ("{% import 'os' as os %}", "no loader"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    "classes by a format": ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
    "changed messages": ("{% set _ = messages.append(1) %}", "SecurityError"),
    "an unknown filter": ("{{ messages|shell }}", "No filter named"),
    "a syntax error": ("{% for %}", "does not compile"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_limits, "MAX_SECONDS", TICK_SECONDS)
    monkeypatch.setattr(render_limits, "TICK_SECONDS", TICK_SECONDS)
    monkeypatch.setattr(render_limits, "MAX_MEMORY_BYTES", 1 << 28)


def limits() -> tuple[object, ...]:
    cpu, memory = resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_AS)
    return cpu, memory, signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF)


@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_seconds_and_names_the_row(text: str, said: str) -> None:
    before, begun, used = limits(), time.monotonic(), time.process_time()
    tokenizer, data = tiny_tokenizer(), data_config(chat_template=text)
    conversations = [Conversation(chat("a", "b"), None, {}, RowRef("rows.parquet", 7))]
    with pytest.raises(DataError, match=said) as caught:
        Renderer(tokenizer, resolve_template(tokenizer, data), data).render(conversations)
    seconds, used = time.monotonic() - begun, time.process_time() - used
    record(
        "a template that does not end, or takes too much memory or output, refused",
        trials=1,
        failures=used > SLOWEST_SECONDS,
        worst_seconds=seconds,
    )
    assert "does not compile" in str(caught.value) or "rows.parquet row 7" in str(caught.value)
    assert used < SLOWEST_SECONDS
    assert limits() == before


def test_after_a_hostile_one_an_honest_one_renders() -> None:
    honest = Sandbox(ChatTemplate(CHATML, "test"), {})
    hostile = Sandbox(ChatTemplate("{{ messages[0].content * 10000000000 }}", "test"), {})
    with honest.bounded(), pytest.raises(RunawayError):
        hostile.render(chat("a"), None, {}, False)
    with honest.bounded():
        assert honest.render(chat("a"), None, {}, False) == "<|im_start|>user\na<|im_end|>\n"


def test_time_between_renderings_is_nobody_s() -> None:
    honest = Sandbox(ChatTemplate(CHATML, "test"), {})
    with honest.bounded():
        honest.render(chat("a"), None, {}, False)
        end = time.process_time() + 2.5 * TICK_SECONDS
        while time.process_time() < end:
            pass
        honest.render(chat("a"), None, {}, False)


def test_the_rows_after_a_hostile_one_are_not_tried() -> None:
    tokenizer, data = tiny_tokenizer(), data_config(chat_template=LOOPS, bad_rows="skip")
    renderer = Renderer(tokenizer, resolve_template(tokenizer, data), data)
    begun = time.process_time()
    with pytest.raises(DataError, match="row 0: the chat template does not come to an end"):
        renderer.try_render([Conversation(chat("a", "b"), None, {}, RowRef("rows", row)) for row in range(100)])
    assert time.process_time() - begun < 10


IN_C = """
from apollo_sft.data.render import limits, sandbox
from apollo_sft.data.render.template import ChatTemplate
limits.KILL_SECONDS = 1
text = "{% set n = 1000000 // messages|length %}{% set a = [1] * n %}{% set b = [a] * n %}{{ b.count([1] * n) }}"
hostile = sandbox.Sandbox(ChatTemplate(text, "test"), {})
with hostile.bounded():
    hostile.render([{"role": "user", "content": "a"}], None, {}, False)
"""


def test_a_loop_in_c_that_hears_no_signal_ends_the_process() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", IN_C]
    ended = python.run(command, cwd=root, capture_output=True, text=True, timeout=SLOWEST_SECONDS)
    assert ended.returncode == -signal.SIGXCPU
    assert "sandbox.py" in ended.stderr
