"""Two hosts train what one host does: two agents of torchrun, processes as srun starts them, two network namespaces."""

import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.checkpoint.run_folder.folder import PROBE
from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import write_word_problems
from tests.support import python

HOST = socket.gethostname()
TIMEOUT_SECONDS = 200
STEPS = 4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = [sys.executable, "-m", "apollo_sft"]
FAILING = """
import os
import torch

step, calls = torch.optim.AdamW.step, []

def fails(self, *arguments, **named):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("the disk of this rank is on fire")
    return step(self, *arguments, **named)

torch.optim.AdamW.step = fails
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_word_problems(folder / "data", 40, 8, seed=1)
    write_base_model(folder / "model", ["Ann has 3 pens. #### 3", "How many pens does Ann have?"] * 20, seed=1)
    (folder / "fails.py").write_text(FAILING)
    return folder


def training(inputs: Path, out: Path) -> list[str]:
    train_file = inputs / "data" / "single_turn" / "train.parquet"
    return [
        f"data.train_files={train_file}",
        "data.val_files=null",
        "data.prompt_key=extra_info",
        "data.response_key=extra_info",
        f"model.partial_pretrain={inputs / 'model'}",
        "data.train_batch_size=8",
        "data.max_length=512",
        f"trainer.total_training_steps={STEPS}",
        "trainer.device=cpu",
        f"trainer.default_local_dir={out}",
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def home(folder: Path, name: str, inputs: Path) -> dict[str, str]:
    """The environment of one host: a home and a temporary folder of its own, nothing of an outer torchrun."""
    own = {"HOME": folder / name, "TMPDIR": folder / name / "tmp", "XDG_CACHE_HOME": folder / name / "cache"}
    (folder / name / "tmp").mkdir(parents=True)
    root = Path(__file__).resolve().parents[2]
    return os.environ | {key: str(path) for key, path in own.items()} | {"PYTHONPATH": f"{root}:{inputs}"}


def start_all(commands: Sequence[tuple[list[str], Mapping[str, str]]]) -> list[subprocess.CompletedProcess[str]]:
    """Start all commands at once, wait for all."""
    running = [
        python.start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, environment in commands
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(running, said, strict=True)
    ]


def agents(port: int, trainings: Sequence[list[str]], at: str = "127.0.0.1") -> list[list[str]]:
    how = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={at}:{port}"]
    return [[*TORCHRUN, *how, "-m", "apollo_sft", *arguments] for arguments in trainings]


def curve(out: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [(record["train/loss"], record["train/grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def one_host(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """What two processes of one host log."""
    folder = tmp_path_factory.mktemp("one_host")
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "apollo_sft", *training(inputs, folder / "out")]
    (finished,) = start_all([(command, home(folder, "home", inputs))])
    assert finished.returncode == 0, finished.stderr[-4000:]
    return curve(folder / "out")


def said_by_us(finished: Sequence[subprocess.CompletedProcess[str]]) -> list[str]:
    return [line for each in finished for line in each.stderr.splitlines() if line.startswith("apollo-sft: ")]


def test_two_agents_train_what_one_host_trains(
    inputs: Path, one_host: list[tuple[float, float]], tmp_path: Path
) -> None:
    out = tmp_path / "shared" / "out"
    arguments = [*training(inputs, out), "trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
    environments = [home(tmp_path, name, inputs) for name in ("a", "b")]
    finished = start_all(list(zip(agents(free_port(), [arguments] * 2), environments, strict=True)))
    assert [each.returncode for each in finished] == [0, 0], finished[0].stderr[-3000:] + finished[1].stderr[-3000:]
    assert curve(out) == one_host
    run: dict[str, Any] = json.loads((out / "run.json").read_text())
    assert (run["processes"], run["hosts"]) == (2, 2)
    assert not (out / PROBE).exists()
    for name in ("a", "b"):  # each host has made its own token store
        assert list((tmp_path / name / "cache").rglob("*.bin")) or list((tmp_path / name / "cache").rglob("*.npy"))
    spoke = ["Done: " in each.stderr for each in finished]
    assert sorted(spoke) == [False, True], "rank 0 alone speaks"


def test_folders_of_one_host_each_are_refused(inputs: Path, tmp_path: Path) -> None:
    trainings = [training(inputs, tmp_path / f"local_{name}") for name in ("a", "b")]
    environments = [home(tmp_path, name, inputs) for name in ("a", "b")]
    finished = start_all(list(zip(agents(free_port(), trainings), environments, strict=True)))
    assert all(each.returncode for each in finished)
    (message,) = said_by_us(finished)
    assert "is not the same folder on every host" in message
    texts = finished[0].stderr + finished[1].stderr
    assert f"rank 1 on {HOST} does not see it in {tmp_path}/local_" in texts
    assert not list(tmp_path.glob(f"local_*/{PROBE}"))
    assert not list(tmp_path.glob("local_*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("differently", "message"),
    [
        (["optim.lr=2e-5", "data.max_length=500"], "data.max_length 500, not 512, optim.lr 2e-05, not 1e-05"),
        (["data.train_files={other}"], 'tokens of data.train_files "'),
    ],
)
def test_hosts_that_were_started_differently_are_refused(
    inputs: Path, tmp_path: Path, differently: list[str], message: str
) -> None:
    write_word_problems(tmp_path / "data", 40, 8, seed=2)
    other = tmp_path / "data" / "single_turn" / "train.parquet"
    second = [text.format(other=other) for text in differently]
    environments = [home(tmp_path, name, inputs) for name in ("a", "b")]
    mine = training(inputs, tmp_path / "out")
    theirs = [text for text in mine if text.partition("=")[0] not in {key.partition("=")[0] for key in second}]
    commands = agents(free_port(), [mine, [*theirs, *second]])
    finished = start_all(list(zip(commands, environments, strict=True)))
    assert all(each.returncode for each in finished)
    text = finished[0].stderr + finished[1].stderr
    assert text.count("not every process was started with the same command, versions and data") == 1, text[-3000:]
    # torchrun decides which of the two is rank 0
    assert message in text or "data.max_length 512, not 500, optim.lr 1e-05, not 2e-05" in text
    assert f"rank 1 on {HOST} has " in text
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "refused"


def srun(inputs: Path, folder: Path, arguments: list[str], size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Plain processes, each on a host of its own as srun would start them, but that all hosts are this one."""
    common = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": str(size), "SLURM_JOB_NODELIST": f"node[1-{size}]"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return start_all(
        [
            (
                [*TRAIN, *arguments],
                home(folder, f"node{i}", inputs)
                | common
                | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0", "SLURM_NODEID": str(i)},
            )
            for i in range(size)
        ]
    )


def test_srun_trains_without_torchrun(inputs: Path, one_host: list[tuple[float, float]], tmp_path: Path) -> None:
    finished = srun(inputs, tmp_path, training(inputs, tmp_path / "out"))
    assert [each.returncode for each in finished] == [0, 0], finished[0].stderr[-3000:] + finished[1].stderr[-3000:]
    assert curve(tmp_path / "out") == one_host
    assert json.loads((tmp_path / "out" / "run.json").read_text())["hosts"] == 2
    assert finished[1].stderr == finished[1].stdout == ""


def test_a_failure_in_a_step_names_rank_host_and_cause_once(inputs: Path, tmp_path: Path) -> None:
    finished = srun(inputs, tmp_path, [*training(inputs, tmp_path / "out"), "model.external_lib=fails"])
    assert [each.returncode for each in finished] == [1, 1]
    assert finished[1].stderr.endswith(
        f"\napollo-sft: rank 1 on {HOST}: RuntimeError: the disk of this rank is on fire\n"
    )
    assert finished[1].stderr.count("Traceback") == 1
    assert "Traceback" not in finished[0].stderr
    (line,) = said_by_us(finished[:1])
    assert line.startswith(f"apollo-sft: rank 0 on {HOST}: lost another rank, which failed first (")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_what_one_host_lacks_is_said_by_it_and_ends_the_other(inputs: Path, tmp_path: Path) -> None:
    """The second host cannot write where its token store is to lie."""
    arguments = [*training(inputs, tmp_path / "out"), "data.store_dir=$HOME/store"]
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "store").write_text("a file, no folder")
    finished = srun(inputs, tmp_path, arguments)
    assert all(each.returncode in (1, 2) for each in finished)
    assert f"apollo-sft: rank 1 on {HOST}: " in finished[1].stderr
    assert said_by_us(finished[:1]) == []


def test_a_refusal_is_said_once_and_ends_all(inputs: Path, tmp_path: Path) -> None:
    finished = srun(inputs, tmp_path, [*training(inputs, tmp_path / "out"), "trainer.nnodes=3"])
    assert [each.returncode for each in finished] == [2, 2]
    (message,) = said_by_us(finished)
    assert message == "apollo-sft: trainer.nnodes is not the number of hosts that were started"
    assert finished[1].stderr == ""


def test_two_processes_in_one_place_are_refused(inputs: Path, tmp_path: Path) -> None:
    """As a cluster would start them that does not set LOCAL_RANK: both would take the first GPU."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = [*TRAIN, *training(inputs, tmp_path / "out")]
    finished = start_all([(arguments, home(tmp_path, f"h{i}", inputs) | common | {"RANK": str(i)}) for i in range(2)])
    assert [each.returncode for each in finished] == [2, 2], finished[0].stderr + finished[1].stderr
    (message,) = said_by_us(finished)
    assert message == "apollo-sft: two processes on one host report the same LOCAL_RANK"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def namespaces() -> Iterator[Callable[[int], list[str]]]:
    """Two network namespaces with a cable between them: 10.177.0.1 and 10.177.0.2. Gives the prefix of a command."""
    tag = uuid.uuid4().hex[:6]
    names = [f"apollo{tag}{i}" for i in (1, 2)]
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", f"v{tag}1", "netns", names[0], "type", "veth", "peer", f"v{tag}2", "netns", names[1])
            for i, name in enumerate(names, start=1):
                ip("-n", name, "addr", "add", f"10.177.0.{i}/24", "dev", f"v{tag}{i}")
                ip("-n", name, "link", "set", f"v{tag}{i}", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield lambda i: ["ip", "netns", "exec", names[i], "env", f"GLOO_SOCKET_IFNAME=v{tag}{i + 1}"]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.long
def test_two_network_namespaces(
    namespaces: Callable[[int], list[str]], inputs: Path, one_host: list[tuple[float, float]], tmp_path: Path
) -> None:
    commands = agents(29400, [training(inputs, tmp_path / "out")] * 2, at="10.177.0.1")
    environments = [home(tmp_path, f"n{i}", inputs) for i in range(2)]
    # The name of this machine says nothing about the namespaces: each agent is told its address, the first its duty.
    local = [f"--local_addr=10.177.0.{i}" for i in (1, 2)]
    host = [f"--rdzv_conf=is_host={int(i == 0)}" for i in range(2)]
    finished = start_all(
        [([*namespaces(i), *commands[i][:3], local[i], host[i], *commands[i][3:]], environments[i]) for i in range(2)]
    )
    assert [each.returncode for each in finished] == [0, 0], finished[0].stderr[-3000:] + finished[1].stderr[-3000:]
    assert curve(tmp_path / "out") == one_host
