"""How many processes `apollo-sft train` starts, and with what."""

import pytest

from apollo_sft.cli.train import _num_processes, _take_nproc, _threads
from apollo_sft.config.compose import compose
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.errors import ConfigError


def trainer(*arguments: str) -> TrainerConfig:
    return compose(arguments).config.trainer


@pytest.mark.parametrize(
    ("arguments", "nproc", "rest"),
    [
        ([], None, []),
        (["a=1", "--nproc", "2", "b=2"], 2, ["a=1", "b=2"]),
        (["--nproc=3"], 3, []),
        (["--nproc", "2", "--nproc=4"], 4, []),
    ],
)
def test_nproc_is_taken_out_of_the_line(arguments: list[str], nproc: int | None, rest: list[str]) -> None:
    assert _take_nproc(arguments) == (nproc, rest)


def test_who_decides_how_many_processes_run() -> None:
    assert _num_processes(trainer("trainer.device=cpu"), None) == 1
    assert _num_processes(trainer("trainer.device=cpu"), 3) == 3
    assert _num_processes(trainer("trainer.n_gpus_per_node=4"), None) == 4
    assert _num_processes(trainer("trainer.n_gpus=4"), 4) == 4
    with pytest.raises(ConfigError, match=r"--nproc and trainer\.n_gpus_per_node differ"):
        _num_processes(trainer("trainer.n_gpus_per_node=4"), 2)


def test_processes_share_the_cores() -> None:
    assert _threads(1) >= _threads(2) >= 1
    assert _threads(10_000) == 1
