"""What is checked, decided and shown before the model is loaded."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from apollo_sft.checkpoint.run_folder.folder import RunFolder, sees_probe, versions
from apollo_sft.config.overrides import leaves
from apollo_sft.config.schema import KEYS, SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import PlanSpec, plan, samples_per_epoch, steps_per_epoch
from apollo_sft.data.store.audit import describe, source_rows, to_json, write_ledger
from apollo_sft.errors import ConfigError, TopologyError
from apollo_sft.model import four_bit, liger
from apollo_sft.parallel.launch import World, answer, ask_others
from apollo_sft.parallel.mesh import check_mesh
from apollo_sft.parallel.ulysses import added_heads
from apollo_sft.report.log import say, terminal, warn
from apollo_sft.train.optim.build import Schedule, warmup_steps
from apollo_sft.train.prepare_run import Prepared
from apollo_sft.train.strategy import check_strategy

LINE_WIDTH = 80
TITLE_WIDTH = 9
LONGEST_VALUE = 400
IMBALANCE_STEPS = 16

OF_A_HOST = frozenset(name for name, key in KEYS.items() if key.per_host)
"""Where things lie may differ. What lies there may not: run folder, tokens and model are compared as such."""


def check_world(config: SftConfig, world: World, overridden: Mapping[str, Any]) -> None:
    """The hosts and processes that were started are those that the config speaks of, and its strategy can serve them.

    `overridden`: keys that were set.

    `trainer.nnodes` is checked only when it was set: its default says nothing about what the user started.
    Raises: TopologyError, ConfigError.
    """
    check_mesh(world.size, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
    check_strategy(config, world)
    four_bit.check(config.model, world.device)
    liger.check(config.model, world.device)
    nnodes, per_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    if nnodes != world.num_hosts and "trainer.nnodes" in overridden:
        raise TopologyError(
            "trainer.nnodes is not the number of hosts that were started",
            found=f"trainer.nnodes={nnodes}, {_hosts(world)}",
            fix=f"start the same command on each of {nnodes} hosts (torchrun --nnodes={nnodes}), "
            f"or trainer.nnodes={world.num_hosts}",
        )
    if per_node is not None and per_node * world.num_hosts != world.size:
        raise TopologyError(
            "trainer.n_gpus_per_node does not fit the processes that were started",
            found=_hosts(world),
            expected=f"{per_node} on each host",
            fix=f"torchrun --nproc_per_node={per_node}, or leave trainer.n_gpus_per_node out",
        )


def _hosts(world: World) -> str:
    return f"{world.size} processes on {world.num_hosts} {'host' if world.num_hosts == 1 else 'hosts'}"


def check_shared(path: str, world: World, folder: RunFolder | None) -> None:
    """Every rank must see the run folder that rank 0 has claimed. Every rank calls it; `folder` is None off rank 0.

    Raises: ConfigError on rank 0, naming each host that does not; the others end in silence.
    """
    if world.size == 1:
        return
    if folder is None:
        answer(world, "probe", lambda text: None if sees_probe(path, text) else _blind(path, world))
        return
    with folder.probe() as text:
        complaints = ask_others("probe", text)
    if complaints:
        more = [f"and {len(complaints) - 4} more ranks"] if len(complaints) > 4 else []
        raise ConfigError(
            f"trainer.default_local_dir={path} is not the same folder on every host",
            found=f"rank 0 on {socket.gethostname()} wrote a file there; " + "; ".join([*complaints[:4], *more]),
            expected="a folder that all hosts share (NFS, Lustre, …)",
            fix="set trainer.default_local_dir to a shared folder on every host; data.store_dir may be local",
        )


def check_alike(name: str, mine: Mapping[str, Any], world: World) -> None:
    """Every rank must have what rank 0 has. Every rank calls it; `name` is used once in a run.

    Raises: ConfigError on rank 0, naming what differs and where; the others end in silence.
    """
    if world.size == 1:
        return
    if not world.is_main:
        answer(world, name, lambda text: _differences(json.loads(text), mine, world))
        return
    complaints = ask_others(name, json.dumps(mine, default=str))
    if complaints:
        raise ConfigError(
            "not every process was started with the same command, versions and data",
            found="; ".join([*complaints[:4], *([f"and {len(complaints) - 4} more ranks"] if complaints[4:] else [])]),
            expected="the same on all hosts",
            fix="start the same command everywhere, with the same packages and the same files",
        )


def start_of(config: SftConfig) -> dict[str, Any]:
    """What all ranks must agree on before anything is read: the config, but for places on a host, and the versions."""
    keys = {key: value for key, value in leaves(config.model_dump(mode="json")) if key not in OF_A_HOST}
    packages = ("bitsandbytes",) if config.model.load_in_4bit else ()
    return keys | {f"version of {name}": found for name, found in versions(packages).items()}


def contents_of(prepared: Prepared) -> dict[str, Any]:
    """What all ranks must have found in the files: the tokens of the data, and the model's config.json."""
    config = json.dumps(prepared.base.config, sort_keys=True, default=str)
    val = None if prepared.val is None else prepared.val.key
    found = {"tokens of data.train_files": prepared.train.key, "tokens of data.val_files": val}
    return found | {"config.json of the model": hashlib.sha256(config.encode()).hexdigest()}


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], world: World) -> str | None:
    now = json.loads(json.dumps(mine, default=str))
    keys = [key for key in now if now[key] != theirs.get(key)] + [key for key in theirs if key not in now]
    shown = ", ".join(f"{key} {_short(now.get(key))}, not {_short(theirs.get(key))}" for key in keys[:4])
    more = f" and {len(keys) - 4} more" if keys[4:] else ""
    return f"rank {world.rank} on {socket.gethostname()} has {shown}{more}" if keys else None


def _short(value: Any) -> str:
    """In one line, and of a digest only the start."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LINE_WIDTH else f"{text[:16]}…"


def _blind(path: str, world: World) -> str:
    return f"rank {world.rank} on {socket.gethostname()} does not see it in {Path(path).absolute()}"


def padded_heads(hf_config: Any, sp_size: int) -> str | None:
    """What sequence parallelism costs where it does not divide the heads; None when it does."""
    heads = hf_config.get_text_config().num_attention_heads
    padded = heads + added_heads(heads, sp_size)
    if padded == heads:
        return None
    return f"{heads} heads padded to {padded} for sp {sp_size}: attention costs {padded / heads:.2f}x"


def schedule_of(config: SftConfig, steps_in_epoch: int) -> Schedule:
    """The learning rate by the number of steps that will really run.

    Raises: ConfigError when there is none.
    """
    trainer, optim = config.trainer, config.optim
    total = trainer.total_training_steps or trainer.total_epochs * steps_in_epoch
    if steps_in_epoch == 0:
        raise ConfigError(
            "there is no step to train: data.drop_last=true drops the only batch",
            found="fewer samples than data.train_batch_size",
            fix="data.drop_last=false, or a smaller data.train_batch_size",
        )
    return Schedule(
        kind=optim.lr_scheduler,
        peak=optim.lr,
        total_steps=total,
        warmup_steps=warmup_steps(total, optim.lr_warmup_steps, optim.warmup_steps_ratio),
        min_ratio=optim.min_lr_ratio,
        stable_ratio=optim.stable_ratio,
    )


def config_text(config: SftConfig, overridden: Mapping[str, Any]) -> str:
    """The resolved configuration: what was set on the command line a line each, the defaults close together."""
    given: list[str] = []
    defaults: dict[str, list[str]] = {}
    for key, value in leaves(config.model_dump(mode="json")):
        if any(f"{key}.".startswith(f"{name}.") for name in overridden):
            given.append(f"{key}={_shown(value)}")
        else:
            section, _, name = key.partition(".") if "." in key else ("top level", "", key)
            defaults.setdefault(section, []).append(f"{name}={_shown(value)}")
    lines = ["Set on the command line:", *(f"  {item}" for item in given or ["nothing"])]
    lines.append(f"Left at the defaults (all is in {config.trainer.default_local_dir}/config.yaml):")
    for section, items in defaults.items():
        lines += _columns(section, items)
    return "\n".join(lines)


def announce(config: SftConfig, prepared: Prepared, schedule: Schedule, loader: Loader, folder: RunFolder) -> None:
    """Show what will be trained, and write it into the run folder: the audit, and every row that is not whole."""
    sources = prepared.sources
    audit = to_json(prepared.train, prepared.val, sources)
    folder.audit.write_text(json.dumps(audit, indent=2, ensure_ascii=False) + "\n")
    write_ledger(prepared.train, prepared.val, folder.rejected)
    num_samples, batch_size = samples_per_epoch(len(prepared.train), loader.spec), config.data.train_batch_size
    rows = steps_in_words(config, len(prepared.train), loader.spec, schedule)
    if loader.spec.dp_size > 1:
        rows.append(("imbalance", imbalance(loader)))
    padding = padded_heads(prepared.hf_config, config.ulysses_sequence_parallel_size)
    if padding is not None:
        say(padding)
    colour = terminal().is_terminal
    table = [row for split, figures in sources.items() for row in source_rows(figures, split)]
    say(describe(prepared.train, prepared.val, prepared.tokenizer, rows, colour, table))
    if num_samples < batch_size:
        warn(
            f"an epoch is one step of {num_samples:,} samples, fewer than data.train_batch_size={batch_size:,}; "
            "the loss is exact all the same"
        )


def steps_in_words(config: SftConfig, num_samples: int, spec: PlanSpec, schedule: Schedule) -> list[tuple[str, str]]:
    """(name, value) of what the steps of a run are. `num_samples`: of the store."""
    in_epoch, num_samples = steps_per_epoch(num_samples, spec), samples_per_epoch(num_samples, spec)
    rows = [
        ("steps per epoch", f"{in_epoch:,}"),
        ("steps", f"{schedule.total_steps:,} ({schedule.total_steps / in_epoch:.4g} epochs)"),
        ("warm-up steps", f"{schedule.warmup_steps:,}"),
        ("samples per step", f"{min(spec.batch_size, num_samples):,}"),
    ]
    if config.data.drop_last and num_samples % spec.batch_size:
        rows.append(("dropped an epoch", f"{num_samples % spec.batch_size:,} samples (data.drop_last)"))
    return rows


def imbalance(loader: Loader) -> str:
    """Mean over steps that are spread over the first epoch."""
    in_epoch = steps_per_epoch(len(loader.store), loader.spec)
    wanted = range(0, in_epoch, -(-in_epoch // IMBALANCE_STEPS))
    found = [plan(loader.store.lengths, loader.spec, step).imbalance() for step in wanted]
    text = f"{sum(found) / len(found):.3f} (cost of the busiest of {loader.spec.dp_size:,} data ranks / mean)"
    return text if loader.spec.balance else f"{text}; data.balance_dp_token=true evens it out"


def _shown(value: Any) -> str:
    """YAML in one line; of a long text (a template) only the start."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    text = text.removesuffix("\n").removesuffix("\n...")
    if "\n" in text:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} … ({len(text):,} characters)"


def _columns(title: str, items: Sequence[str]) -> list[str]:
    """`title` and all items, as many in a line as fit."""
    lines = [f"  {title:<{TITLE_WIDTH}}"]
    for item in items:
        if len(lines[-1]) + 2 + len(item) > LINE_WIDTH and lines[-1].strip() != title:
            lines.append(" " * (2 + TITLE_WIDTH))
        lines[-1] += f"  {item}"
    return lines
