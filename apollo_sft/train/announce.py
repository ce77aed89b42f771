"""What a person reads at the start of a run: its keys, its data, its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.config.overrides import leaves
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import PlanSpec, plan, samples_per_epoch, steps_per_epoch
from apollo_sft.data.store.audit import describe, source_rows, to_json, write_findings, write_ledger
from apollo_sft.report.log import say, terminal, warn
from apollo_sft.train.optim.build import Schedule
from apollo_sft.train.prepare_run import Prepared

LINE_WIDTH = 80
TITLE_WIDTH = 9
LONGEST_VALUE = 400
IMBALANCE_STEPS = 16


def config_text(config: SftConfig, overridden: Mapping[str, Any]) -> str:
    """Return the resolved configuration: a line for each key of the command line, the defaults in columns."""
    given: list[str] = []
    defaults: dict[str, list[str]] = {}
    for key, value in leaves(config.model_dump(mode="json")):
        if any(f"{key}.".startswith(f"{name}.") for name in overridden):
            given.append(f"{key}={_shown(value)}")
        else:
            section, dot, name = key.partition(".")
            if not dot:
                section = "top level"
                name = key
            defaults.setdefault(section, []).append(f"{name}={_shown(value)}")

    lines = ["Set on the command line:", *(f"  {item}" for item in given or ["nothing"])]
    lines.append(f"Left at the defaults (all is in {config.trainer.default_local_dir}/config.yaml):")
    for section, items in defaults.items():
        lines += _columns(section, items)
    return "\n".join(lines)


def announce(prepared: Prepared, schedule: Schedule, loader: Loader, sp_size: int, folder: RunFolder) -> None:
    """Show what will be trained, and write it into the run folder: the audit, and every row that is not complete.

    `sp_size`: ranks that share one sequence.
    """
    sources = prepared.sources
    audit = to_json(prepared.train, prepared.val, sources)
    folder.audit.write_text(json.dumps(audit, indent=2, ensure_ascii=False) + "\n")
    write_ledger(prepared.train, prepared.val, folder.rejected)
    write_findings(prepared.train, prepared.val, folder.findings)

    num_samples = samples_per_epoch(len(prepared.train), loader.spec)
    batch_size = loader.spec.batch_size

    rows = steps_in_words(len(prepared.train), loader.spec, schedule)
    if loader.spec.dp_size > 1:
        rows.append(("imbalance", imbalance(loader)))
    if sp_size > 1:
        padding = padded_heads(prepared.hf_config, sp_size)
        if padding is not None:
            say(padding)

    colour = terminal().is_terminal
    table: list[Any] = []
    for split, figures in sources.items():
        table += source_rows(figures, split)
    say(describe(prepared.train, prepared.val, prepared.tokenizer, rows, colour, table))

    if num_samples < batch_size:
        warn(
            f"an epoch is one step of {num_samples:,} samples, fewer than data.train_batch_size={batch_size:,}; "
            "the loss is exact all the same"
        )


def steps_in_words(num_samples: int, spec: PlanSpec, schedule: Schedule) -> list[tuple[str, str]]:
    """Return (name, value) rows about the steps of a run. `num_samples`: of the store."""
    in_epoch = steps_per_epoch(num_samples, spec)
    # Weights of sources repeat samples or leave some out: an epoch has another number of them than the store.
    num_samples = samples_per_epoch(num_samples, spec)
    rows = [
        ("steps per epoch", f"{in_epoch:,}"),
        ("steps", f"{schedule.total_steps:,} ({schedule.total_steps / in_epoch:.4g} epochs)"),
        ("warm-up steps", f"{schedule.warmup_steps:,}"),
        ("samples per step", f"{min(spec.batch_size, num_samples):,}"),
    ]
    if spec.drop_last and num_samples % spec.batch_size:
        rows.append(("dropped an epoch", f"{num_samples % spec.batch_size:,} samples (data.drop_last)"))
    return rows


def imbalance(loader: Loader) -> str:
    """Return the mean imbalance of the data ranks, in words."""
    in_epoch = steps_per_epoch(len(loader.store), loader.spec)
    # To plan every step of a large store would take minutes: some steps, spread over the first epoch, are enough.
    wanted = range(0, in_epoch, -(-in_epoch // IMBALANCE_STEPS))
    found = [plan(loader.store.lengths, loader.spec, step).imbalance() for step in wanted]
    text = f"{sum(found) / len(found):.3f} (cost of the busiest of {loader.spec.dp_size:,} data ranks / mean)"
    if not loader.spec.balance:
        text += "; data.balance_dp_token=true evens it out"
    return text


def padded_heads(hf_config: Any, sp_size: int) -> str | None:
    """Return what sequence parallelism costs where it does not divide the heads; None when it does."""
    from apollo_sft.parallel.ulysses import added_heads

    heads = hf_config.get_text_config().num_attention_heads
    padded = heads + added_heads(heads, sp_size)
    if padded == heads:
        return None
    return f"{heads} heads padded to {padded} for sp {sp_size}: attention costs {padded / heads:.2f}x"


def _shown(value: Any) -> str:
    """Return a value as YAML in one line; of a long text (a template) only the start."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    text = text.removesuffix("\n").removesuffix("\n...")
    if "\n" in text:
        text = json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_VALUE:
        return f"{text[:LONGEST_VALUE]} … ({len(text):,} characters)"
    return text


def _columns(title: str, items: Sequence[str]) -> list[str]:
    """Return lines with the title and all items, as many in a line as fit."""
    lines = [f"  {title:<{TITLE_WIDTH}}"]
    for item in items:
        if len(lines[-1]) + 2 + len(item) > LINE_WIDTH and lines[-1].strip() != title:
            lines.append(" " * (2 + TITLE_WIDTH))
        lines[-1] += f"  {item}"
    return lines
