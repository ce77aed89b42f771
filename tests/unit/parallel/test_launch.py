"""Who a process is, from the environment of torchrun, srun and Kubernetes; lists of hosts as SLURM writes them."""

import os
import socket

import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.errors import TopologyError
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.place import read_place
from apollo_sft.parallel.slurm import PORTS, expand_nodelist
from apollo_sft.train.start_checks import check_world

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "node[003-005,9],gpu1",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "x",
}
KUBERNETES = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu1,gpu2", ["gpu1", "gpu2"]),
        ("node[003-005,9],gpu1", ["node003", "node004", "node005", "node9", "gpu1"]),
        ("node[09-11]", ["node09", "node10", "node11"]),
        ("r[1-2]n[01,3]", ["r1n01", "r1n3", "r2n01", "r2n3"]),
        ("a[1-2]-ib,b-c.example.org", ["a1-ib", "a2-ib", "b-c.example.org"]),
        ("n[7]", ["n7"]),
    ],
)
def test_lists_of_hosts(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


@pytest.mark.parametrize(
    "text", ["", ",", "n[", "n[1-", "n[2-1]", "n[]", "n[1,]", "n]1[", "n[a-b]", "a,,b", "n[1-2-3]"]
)
def test_what_is_no_list_of_hosts(text: str) -> None:
    with pytest.raises(ValueError):
        expand_nodelist(text)


def test_nothing_set_is_one_process() -> None:
    place = read_place({"PATH": "/bin", "MASTER_ADDR": "left-over", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert (place.rank, place.size, place.local_rank) == (0, 1, 0)
    assert "MASTER_ADDR" not in place.variables


def test_srun() -> None:
    place = read_place(SRUN)
    assert (place.rank, place.size, place.local_rank, place.starter) == (5, 16, 1, "srun")
    assert place.variables == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "node003",
        "MASTER_PORT": str(PORTS[1234567 % len(PORTS)]),
    }
    again = read_place(SRUN | place.variables)
    assert (again.rank, again.size, again.local_rank, again.host) == (5, 16, 1, place.host)


def test_srun_with_what_the_user_sets() -> None:
    assert read_place(SRUN | {"MASTER_ADDR": "127.0.0.1"}).variables["MASTER_ADDR"] == "127.0.0.1"
    assert read_place(SRUN | {"MASTER_PORT": "1234"}).variables["MASTER_PORT"] == "1234"
    assert read_place(SRUN | {"SLURM_STEP_NODELIST": "other7"}).variables["MASTER_ADDR"] == "other7"
    assert read_place(SRUN | {"WORLD_SIZE": "16"}).size == 16
    with pytest.raises(TopologyError, match="WORLD_SIZE=8, SLURM_NTASKS=16"):
        read_place(SRUN | {"WORLD_SIZE": "8"})


def test_two_steps_of_a_job_use_two_ports() -> None:
    ports = {read_place(SRUN | {"SLURM_STEP_ID": step}).variables["MASTER_PORT"] for step in "01"}
    assert len(ports) == 2
    assert all(int(port) in PORTS for port in ports)


def test_torchrun_inside_srun_rules() -> None:
    place = read_place(SRUN | TORCHRUN)
    assert (place.rank, place.size, place.local_rank, place.local_size, place.starter) == (3, 4, 1, 2, "torchrun")
    assert place.variables["GROUP_RANK"] == "1"


def test_kubernetes() -> None:
    place = read_place(KUBERNETES)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (3, 4, 1, None)
    assert place.host.startswith(socket.gethostname())
    one_a_pod = {key: value for key, value in KUBERNETES.items() if key != "LOCAL_RANK"}
    assert read_place(one_a_pod).local_rank == 0


def test_two_agents_on_one_machine_are_two_hosts() -> None:
    assert read_place(TORCHRUN).host != read_place(TORCHRUN | {"GROUP_RANK": "0"}).host


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("environ", [TORCHRUN, KUBERNETES], ids=["torchrun", "kubernetes"])
def test_half_an_environment_names_what_is_missing(environ: dict[str, str], name: str) -> None:
    with pytest.raises(TopologyError, match=f"the environment variable {name} is not set"):
        read_place({key: value for key, value in environ.items() if key != name})


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"LOCAL_RANK": "0"}, "RANK is not set"),
        (KUBERNETES | {"RANK": "x"}, "RANK is not a number"),
        (KUBERNETES | {"RANK": "-1"}, "RANK is not a number"),
        (KUBERNETES | {"WORLD_SIZE": "0"}, "WORLD_SIZE is not a number"),
        (KUBERNETES | {"RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID is not a number"),
        (SRUN | {"SLURM_JOB_NODELIST": "n[1"}, "SLURM_JOB_NODELIST cannot be read"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_JOB_NODELIST"}, "MASTER_ADDR is not set"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_JOB_ID"}, "MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_makes_no_sense(environ: dict[str, str], part: str) -> None:
    with pytest.raises(TopologyError, match=part):
        read_place(environ)


def test_one_process_leaves_its_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program that trains starts afterwards must not take itself for a rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    world = launch.start("cpu", needs_group=False)
    assert (world.rank, world.size, world.num_hosts) == (0, 1, 1)
    assert dict(os.environ) == before


def checked(size: int, hosts: int, *overrides: str) -> None:
    composed = compose(["data.train_files=x", "data.val_files=null", *overrides])
    check_world(composed.config, World(0, size, 0, torch.device("cpu"), num_hosts=hosts), composed.overridden)


def test_nnodes_is_checked_when_it_is_set() -> None:
    checked(4, 2)
    checked(4, 2, "trainer.nnodes=2", "trainer.n_gpus_per_node=2")
    checked(4, 2, "trainer.n_gpus_per_node=2")
    with pytest.raises(TopologyError, match=r"trainer\.nnodes=1, 4 processes on 2 hosts"):
        checked(4, 2, "trainer.nnodes=1")
    with pytest.raises(TopologyError, match=r"trainer\.nnodes=3, 4 processes on 1 host\n"):
        checked(4, 1, "trainer.nnodes=3")
    with pytest.raises(TopologyError, match=r"n_gpus_per_node does not fit[^$]*4 processes on 2 hosts"):
        checked(4, 2, "trainer.n_gpus_per_node=4")
