"""Checks before a run folder is claimed or a file is read: the processes, and the facts they must agree on."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.run_folder.folder import RunFolder, sees_probe, versions
from apollo_sft.config.overrides import leaves
from apollo_sft.config.schema import KEYS, SftConfig
from apollo_sft.errors import ConfigError, TopologyError
from apollo_sft.parallel.consensus import collect_objections, named, object_to
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import check_mesh
from apollo_sft.train.prepare_run import Prepared
from apollo_sft.train.strategy import check_strategy

OF_A_HOST = frozenset(name for name, key in KEYS.items() if key.per_host)
"""Paths may differ between hosts. The content may not: run folder, tokens and model are compared themselves."""


def check_world(config: SftConfig, world: World, overridden: Mapping[str, Any]) -> None:
    """Check that the hosts and processes that were started are those of the config, and that its strategy serves them.

    `overridden`: keys that were set.

    `trainer.nnodes` is checked only when it was set: the user may have started more nodes without naming them.
    Raises: TopologyError, ConfigError.
    """
    check_mesh(world.size, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
    check_strategy(config.model, config.optim, world)
    if config.model.load_in_4bit:
        from apollo_sft.model import four_bit

        four_bit.check(config.model, world.device)
    if config.model.use_liger:
        from apollo_sft.model import liger

        liger.check(config.model, world.device)

    nnodes = config.trainer.nnodes
    if nnodes != world.num_hosts and "trainer.nnodes" in overridden:
        raise TopologyError(
            "trainer.nnodes is not the number of hosts that were started",
            found=f"trainer.nnodes={nnodes}, {_hosts(world)}",
            fix=f"start the same command on each of {nnodes} hosts (torchrun --nnodes={nnodes}), "
            f"or trainer.nnodes={world.num_hosts}",
        )

    per_node = config.trainer.n_gpus_per_node
    if per_node is not None and per_node * world.num_hosts != world.size:
        raise TopologyError(
            "trainer.n_gpus_per_node does not fit the processes that were started",
            found=_hosts(world),
            expected=f"{per_node} on each host",
            fix=f"torchrun --nproc_per_node={per_node}, or leave trainer.n_gpus_per_node out",
        )


def _hosts(world: World) -> str:
    if world.num_hosts == 1:
        return f"{world.size} processes on 1 host"
    return f"{world.size} processes on {world.num_hosts} hosts"


def check_shared(path: str, world: World, folder: RunFolder | None) -> None:
    """Refuse the run unless every rank sees the run folder that rank 0 has claimed. Every rank calls it.

    `folder` is None off rank 0.
    Raises: ConfigError on rank 0, which names the ranks that do not see it; the others exit silently.
    """
    if world.size == 1:
        return
    if folder is None:
        object_to(world, "run folder", partial(_objection, path, world))
        return

    with folder.probe() as text:
        objections = collect_objections("run folder", text)
    if objections:
        raise ConfigError(
            f"trainer.default_local_dir={path} is not the same folder on every host",
            found=f"rank 0 on {socket.gethostname()} wrote a file there; {named(objections)}",
            expected="a folder that all hosts share (NFS, Lustre, …)",
            fix="set trainer.default_local_dir to a shared folder on every host; data.store_dir may be local",
        )


def start_of(config: SftConfig) -> dict[str, Any]:
    """Return what all ranks must agree on before anything is read: the config, without paths, and the versions."""
    keys = {key: value for key, value in leaves(config.model_dump(mode="json")) if key not in OF_A_HOST}
    packages: tuple[str, ...] = ()
    if config.model.load_in_4bit:
        packages = ("bitsandbytes",)
    return keys | {f"version of {name}": found for name, found in versions(packages).items()}


def contents_of(prepared: Prepared) -> dict[str, Any]:
    """Return what all ranks must have found in the files: the tokens of the data, and the model's config.json."""
    config = json.dumps(prepared.base.config, sort_keys=True, default=str)
    val = None
    if prepared.val is not None:
        val = prepared.val.key
    return {
        "tokens of data.train_files": prepared.train.key,
        "tokens of data.val_files": val,
        "config.json of the model": hashlib.sha256(config.encode()).hexdigest(),
    }


def _objection(path: str, world: World, probe: str) -> str | None:
    """Return that this rank does not see what rank 0 wrote into the folder; None when it does."""
    if sees_probe(path, probe):
        return None
    return f"rank {world.rank} on {socket.gethostname()} does not see it in {Path(path).absolute()}"
