"""Programs in lines of bash that are forked: for bash they are what a started program is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import shell

SHOW = """
import json, os, sys

print(json.dumps({
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "forked": "torch" in sys.modules,
    "input": sys.stdin.read(),
    "variable": os.environ["MINE"],
}))
print("to the other stream", file=sys.stderr)
sys.exit(7)
"""


def run(line: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ended = shell.run(line, folder, os.environ | variables, seconds=60)
    return ended.returncode, ended.stdout, ended.stderr


def test_it_gets_and_gives_what_a_started_program_does(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "show.py").write_text(SHOW)
    line = "cd below; echo 'a line' | MINE='ü 1' python3 show.py a=1 'ä b'; echo code $?; exit 3"
    code, out, err = run(line, tmp_path)
    shown, last = out.splitlines()

    assert (code, last, err) == (3, "code 7", "to the other stream\n")
    assert json.loads(shown) == {
        "arguments": ["a=1", "ä b"],
        "folder": str(tmp_path / "below"),
        "forked": True,
        "input": "a line\n",
        "variable": "ü 1",
    }


def test_programs_of_one_pipe_run_together(tmp_path: Path) -> None:
    """The second has to end for the first one to end: nobody reads the rest of what it writes."""
    (tmp_path / "writes.py").write_text("while True:\n    print('one')")
    (tmp_path / "reads.py").write_text("print(input(), 'was read')")
    code, out, _ = run("python3 writes.py 2> /dev/null | python3 reads.py; echo ${PIPESTATUS[@]}", tmp_path)
    assert (code, out) == (0, "one was read\n1 0\n")


@pytest.mark.parametrize(
    ("handler", "code"), [("sys.exit(5)", 5), ("os.kill(os.getpid(), 9)", 128 + 9)], ids=["handled", "killed"]
)
def test_a_signal_reaches_it_and_its_end_is_that_of_the_script(tmp_path: Path, handler: str, code: int) -> None:
    (tmp_path / "waits.py").write_text(
        "import os, signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: {handler})\n"
        "print('here', flush=True)\n"
        "while True:\n"
        "    signal.pause()\n"
    )
    line = "mkfifo said; python3 waits.py > said & read word < said; kill %1; wait %1; echo $word $?"
    assert run(line, tmp_path)[:2] == (0, f"here {code}\n")


@pytest.mark.parametrize("program", ["torchrun", "apollo-sft"])
def test_the_words_of_a_program_are_its_own(tmp_path: Path, program: str) -> None:
    code, out, _ = run(f"{program} --help", tmp_path)
    assert code == 0
    assert {"torchrun": "--nproc-per-node", "apollo-sft": "prepare"}[program] in out
