"""`python -m apollo_sft`, `apollo-sft` and `apollo-sft train`: what they answer before anything is trained."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apollo_sft import __main__ as entry
from apollo_sft.cli import main as dispatcher
from apollo_sft.cli import train
from apollo_sft.config.compose import known_keys
from apollo_sft.errors import ApolloError, CheckpointError, ConfigError, TrainingError
from apollo_sft.parallel import failure
from tests.support import python

HOST = socket.gethostname()
MISSPELT = "data.max_lenght=8"
MODULE = ["-m", "apollo_sft"]
COMMAND = ["-m", "apollo_sft.cli.main", "train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", "-m", "apollo_sft"]


MOST_MODULES = 600
"""So that a mistake is said at once: torch alone has more than a thousand, transformers several times that."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("program", [MODULE, COMMAND], ids=["module", "command"])
@pytest.mark.parametrize(
    "mistake",
    [MISSPELT, "data.max_length=long", "trainer.logger=[consoles]", "data.val_files=null"],
    ids=["key", "type", "combination", "path"],
)
def test_a_mistake_is_one_message_code_2_and_no_torch(program: list[str], mistake: str) -> None:
    finished = run("-X", "importtime", *program, "data.train_files=/no/train.parquet", "data.val_files=null", mistake)
    loaded = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines() if "|" in line}
    said = [line for line in finished.stderr.splitlines() if not line.startswith("import time:")]
    assert finished.returncode == 2
    assert "hydra" in loaded
    assert not loaded & {"torch", "transformers", "pyarrow"}
    assert said[0].startswith("apollo-sft: ")
    assert not any("Traceback" in line for line in said)
    assert finished.stdout == ""
    assert len(loaded) < MOST_MODULES


def test_torchrun_says_it_once() -> None:
    finished = python.run([sys.executable, *TORCHRUN, MISSPELT], capture_output=True, text=True, timeout=120)
    assert finished.returncode != 0
    assert finished.stderr.count("unknown key data.max_lenght") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["data.max_length=8", "--help"]])
def test_help_shows_every_key_with_its_default(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"{key.rpartition('.')[2]}: " in text for key in known_keys())
    assert "--nproc N" in text


def test_cfg_job_prints_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["data.micro_batch_size=2", "--cfg", "job", "optim.lr=1e-4"]) == 0
    text = capsys.readouterr().out
    assert "micro_batch_size_per_gpu: 2\n" in text
    assert "lr: 0.0001\n" in text
    assert entry.main(["--cfg", "hydra"]) == 2
    assert "--cfg job" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_ranks_other_than_0_print_nothing(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert entry.main(arguments) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rank", "error", "expected"),
    [
        ("0", ConfigError("bad"), "apollo-sft: bad\n"),
        ("1", ConfigError("bad"), ""),
        ("1", TrainingError("bad"), ""),
        ("0", CheckpointError("bad"), "apollo-sft: bad\n"),
        ("1", CheckpointError("disk full"), f"apollo-sft: rank 1 on {HOST}: disk full\n"),
    ],
)
def test_which_rank_says_what(
    rank: str,
    error: ApolloError,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert failure.report(error) == bool(expected)
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("bad"), f"apollo-sft: rank 2 on {HOST}: bad\n"),
        (TrainingError("not finite on all ranks"), ""),
    ],
)
def test_another_host_speaks_of_what_may_be_its_own(
    error: ApolloError, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert failure.report(error) == bool(expected)
    assert capsys.readouterr().err == expected


def test_an_unexpected_error_names_rank_and_host_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failure.report_unexpected(ValueError("boom"))
    assert capsys.readouterr().err == "ValueError: boom\napollo-sft: ValueError: boom\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failure.report_unexpected(KeyError("boom"))
    assert capsys.readouterr().err == f"KeyError: 'boom'\napollo-sft: rank 1 on {HOST}: KeyError: 'boom'\n"


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1234",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exited prematurely",
    ],
)
def test_a_rank_that_lost_another_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not failure.report_unexpected(RuntimeError(text))
    said = capsys.readouterr().err
    assert said.startswith("apollo-sft: lost another rank, which failed first (")
    assert said.count("\n") == 1


def test_help_into_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m apollo_sft --help | head -n 1"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert finished.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "train"),
        (["--help"], 0, "demo"),
        (["--version"], 0, "apollo-sft 0."),
        (["tran"], 2, "unknown command tran, did you mean train?"),
        (["sing"], 2, "there are train"),
        (["train", MISSPELT], 2, "did you mean data.max_length?"),
    ],
)
def test_the_dispatcher(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(arguments) == code
    captured = capsys.readouterr()
    assert said in (captured.err if code else captured.out)


@pytest.mark.parametrize("arguments", [["--nproc"], ["--nproc=0"], ["--nproc", "two"], ["--nproc=-1"]])
def test_nproc_takes_a_number(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="--nproc takes a number of processes"):
        train.main(arguments)


@pytest.fixture
def waiting_run(tmp_path: Path) -> list[str]:
    """Arguments of a run that waits in the user's own module, which lies in the working directory."""
    (tmp_path / "train.parquet").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "waits.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(f'rank{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\n"
        "time.sleep(100)\n"
    )
    return [
        "data.train_files=train.parquet",
        "data.val_files=null",
        "model.partial_pretrain=./model",
        "model.external_lib=waits",
        "trainer.device=cpu",
        f"trainer.default_local_dir={tmp_path}/out",
    ]


def test_nproc_and_n_gpus_per_node_must_agree(
    waiting_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--nproc and trainer\.n_gpus_per_node differ"):
        train.main([*waiting_run, "--nproc=2", "trainer.n_gpus_per_node=3"])


def test_nproc_starts_that_many_ranks_and_a_signal_reaches_them(waiting_run: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *COMMAND, "--nproc", "2", *waiting_run]
    root = str(Path(__file__).resolve().parents[3])
    process = python.start(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    files = [tmp_path / "rank0", tmp_path / "rank1"]
    try:
        deadline = time.monotonic() + 90
        while not all(file.exists() and file.read_text() for file in files):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert not (tmp_path / "rank2").exists()
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
