"""A process that has imported what a training needs, and computed nothing: it forks itself for everyone who asks.

Nothing may have been computed here, since threads (of OpenMP, of autograd) do not live on in a fork. A process that
starts others, as torchrun does, gets a server of its own, forked before it begins: only so are they its children.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

from tests.support import python

subprocess.Popen = python.Process  # type: ignore[misc]  # before anyone takes a name of its own for it

IMPORTED = (
    "apollo_sft.train.run",
    "peft",
    "pytest",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "transformers.conversion_mapping",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
)
READ_AT_IMPORT = (
    *("CUDA_", "HF_", "HUGGINGFACE_", "KMP_", "LANG", "LC_", "LD_", "MKL_", "OMP_", "OPENBLAS_", "TORCHDYNAMO_"),
    *("TORCHINDUCTOR_", "TORCH_HOME", "TORCH_LOGS", "TRANSFORMERS_", "TRITON_", "TZ"),
)
"""Beginnings of the variables that libraries read while they are imported: they cannot change any more.

HOME may change. Hugging Face has asked for it by then: a test that is about its folders sets HF_HOME.
"""

CHANGEABLE = {
    "HF_TOKEN",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPATH",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS",
    "TRITON_CACHE_DIR",
}
"""Those that can be changed in a process that runs all the same. The token is read when the hub is asked. Torch sets
the caches, a training in the test's own process the warnings: they must not end the forking for all tests after it."""

AT_START = ("sitecustomize", "usercustomize")
"""Modules that Python imports when it starts."""

WITHOUT_CHILDREN = ("apollo_sft", "tests.support.rank")
"""Modules that start no `python -m`, and need no server of their own."""

PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG in linux/prctl.h."""

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != python.ROOM}
ENVIRONMENT_BEGIN, ENVIRONMENT_END = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
"""Where in memory the variables lie that /proc/PID/environ shows: fields 50 and 51 of proc(5)."""


@dataclass(frozen=True)
class Request:
    """One command. `line`: all of it; `what`: -m, -c or file; `words`: from the name of that, or the code, on.

    `numbers`: what the received `descriptors` are to be called in the process.
    """

    line: list[str]
    what: str
    words: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool
    numbers: list[int]
    descriptors: list[int]


def declines(request: Request) -> bool:
    """Whether this server's imports are not what that command would import."""
    fixed = [name for name in {*request.environment, *ENVIRONMENT} if name.startswith((*READ_AT_IMPORT, "PYTHON"))]
    changed = [name for name in fixed if request.environment.get(name) != ENVIRONMENT.get(name)]
    if set(changed) - CHANGEABLE:
        return True

    new = set(_python_path(request.environment, request.folder)) - set(sys.path)
    found = [path for folder in new if Path(folder).is_dir() for path in Path(folder).iterdir()]
    seen = [path for path in found if path.stem in AT_START or path.stem in sys.modules]
    installed = [path for path in found if path.suffix == ".dist-info"]  # libraries have asked what there is
    return bool(seen or installed)


def _python_path(environment: dict[str, str], folder: str) -> list[str]:
    entries = environment.get("PYTHONPATH", "").split(os.pathsep)
    return [str(Path(folder) / entry) for entry in entries if entry]


def serve(connection: socket.socket) -> Request:
    """Fork until nobody asks any more, and end then. Returns in the forked processes only, with what they are to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to everyone; the tests end this process
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 2 * python.LONGEST_MESSAGE, 64)
        if not message:
            os._exit(0)

        request = Request(**json.loads(message), descriptors=descriptors)
        if declines(request):
            answer = 0
        else:
            answer = _fork_orphan()
            if answer is None:
                connection.close()
                return request

        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(answer).encode())


def _fork_orphan() -> int | None:
    """Fork a process whose parent is gone, so that it falls to the one who asked. Its pid; None in the process."""
    reader, writer = os.pipe()
    between = os.fork()
    if between:
        os.close(writer)
        with os.fdopen(reader) as answer:
            pid = int(answer.read())
        os.waitpid(between, 0)
        return pid

    os.close(reader)
    between = os.getpid()
    pid = os.fork()
    if pid:
        os.write(writer, str(pid).encode())
        os._exit(0)

    os.close(writer)
    while os.getppid() == between:  # whoever asks for the death signal of its parent must mean the lasting one
        time.sleep(0.0002)
    return None


def server_below(held: list[int]) -> Request | None:
    """Fork a server for the children of this process. None here; in its forked processes what they are to do.

    `held`: descriptors of this process, which its server must not keep open after its end.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        python.serve_from(ours)
        return None

    ours.close()
    for descriptor in held:
        os.close(descriptor)
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    return serve(theirs)


def become(request: Request) -> None:
    """Take the streams, variables, folder and words of a command."""
    _take_streams(request.descriptors, request.numbers)
    if "-u" in request.line[1:2]:
        raw = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(raw, sys.stdout.encoding, sys.stdout.errors, write_through=True)  # type: ignore[arg-type]
    else:
        sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    _take_environment(request.environment)
    os.chdir(request.folder)

    of_python = [entry for entry in sys.path[1:] if entry not in _python_path(ENVIRONMENT, str(python.ROOT))]
    first = {"-m": request.folder, "-c": "", "file": str(Path(request.folder, request.words[0]).resolve().parent)}
    sys.path[:] = [first[request.what], *_python_path(request.environment, request.folder), *of_python]
    sys.argv = ["-c", *request.words[1:]] if request.what == "-c" else list(request.words)
    sys.orig_argv = list(request.line)
    sys.dont_write_bytecode = bool(request.environment.get("PYTHONDONTWRITEBYTECODE"))
    tempfile.tempdir = None
    importlib.invalidate_caches()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()


def _take_streams(descriptors: list[int], numbers: list[int]) -> None:
    free = max(numbers) + 1
    kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, free) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)

    for descriptor, number in zip(kept, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _take_environment(environment: dict[str, str]) -> None:
    os.environ.clear()  # each is set anew then, in memory of its own
    os.environ.update(environment)

    room = ENVIRONMENT_END - ENVIRONMENT_BEGIN
    shown = "".join(f"{name}={value}\0" for name, value in environment.items())
    ctypes.memmove(ENVIRONMENT_BEGIN, os.fsencode(shown)[:room].ljust(room, b"\0"), room)


def main() -> None:
    """Serve; then, in a forked process, be the command."""
    gc.disable()  # what is there now stays, and need not be looked at in every fork
    for name in IMPORTED:
        importlib.import_module(name)
    # Transformers makes its table of all models at the first question. It is text and patterns, without any thread.
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("qwen2")
    gc.freeze()

    request: Request | None = serve(socket.socket(fileno=int(sys.argv[1])))
    while request is not None:
        if request.new_session:
            os.setsid()
        command, request = request, None
        if command.words[0] not in WITHOUT_CHILDREN:
            request = server_below(command.descriptors)

    become(command)
    go(command.what, command.words[0])


def go(what: str, name: str) -> None:
    """As Python does, for which every name is a new one."""
    if what == "file":
        runpy.run_path(name, run_name="__main__")
    elif what == "-m":
        # A module is run once more under another name. A package stays: its modules are its attributes.
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(name, "<string>", "exec"), vars(sys.modules["__main__"]))  # noqa: S102


if __name__ == "__main__":
    main()
