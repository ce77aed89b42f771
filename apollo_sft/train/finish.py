"""The end of a run: the model folder, and what a person wants to read last."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from apollo_sft.checkpoint.model_folder.write import (
    AdapterForm,
    ExportOptions,
    ModelForm,
    model_form,
    save_model,
)
from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.config.schema import ModelConfig, TrainerConfig
from apollo_sft.config.values import trains_adapter
from apollo_sft.data.render.template import ChatTemplate, is_own
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.report.console import clock
from apollo_sft.report.log import say
from apollo_sft.report.metrics import losses_by_name
from apollo_sft.train.prepare_run import Prepared
from apollo_sft.train.reporter import Reporter
from apollo_sft.train.strategy import strategy_of

IN_CHECKPOINT = "model/causal_lm."
"""The prefix of a parameter's name in a checkpoint."""

NAMED_STAGES = 4
"""Stages of a run that its summary names."""


def export(
    keys: ModelConfig,
    trainer: TrainerConfig,
    prepared: Prepared,
    model: SftModel,
    folder: RunFolder | None,
    world: World,
) -> None:
    """Write the model into the run folder. Every rank calls it; `folder` is None off rank 0.

    Raises: CheckpointError when what was written is not what was to be written; nothing is visible then.
    """
    # Off rank 0 nothing is written: any folder will do there.
    root = prepared.base.folder
    if folder is not None:
        root = folder.root
    say("writing the model")
    if trains_adapter(keys):
        from apollo_sft.train.finish_adapter import export_adapter

        export_adapter(keys, trainer, prepared, model, root, world)
        return

    options = export_options(prepared, trainer.export_dtype, keys.trust_remote_code)
    model = strategy_of(model).as_row_sharded(model)
    save_model(model.causal_lm, prepared.base, root, options, world.is_main)


def export_options(prepared: Prepared, export_dtype: str, trust_remote_code: bool) -> ExportOptions:
    """Return how the model of a run is written."""
    stops = tuple(prepared.train.summary.stop_tokens)
    return options_of(prepared.tokenizer, prepared.template, stops, export_dtype, trust_remote_code)


def options_of(
    tokenizer: Any, template: ChatTemplate, stops: tuple[int, ...], export_dtype: str, trust_remote_code: bool
) -> ExportOptions:
    """Return how a model is written. The template is written where it is not the tokenizer's own."""
    changed = None
    if not is_own(tokenizer, template):
        changed = template.text
    return ExportOptions(
        tokenizer=tokenizer,
        chat_template=changed,
        stop_token_ids=stops,
        export_dtype=export_dtype,
        trust_remote_code=trust_remote_code,
    )


def hf_form(
    model: ModelConfig, trainer: TrainerConfig, prepared: Prepared, causal_lm: Any
) -> ModelForm | AdapterForm | None:
    """Return how checkpoints write `hf/`, or None when they do not. `causal_lm`: live, or on meta for sizes only."""
    if "hf_model" not in trainer.checkpoint.save_contents:
        return None
    options = export_options(prepared, trainer.export_dtype, model.trust_remote_code)
    if trains_adapter(model):
        from apollo_sft.train.finish_adapter import adapter_form

        return adapter_form(prepared, causal_lm, IN_CHECKPOINT, options)
    return model_form(causal_lm, IN_CHECKPOINT, prepared.base, options)


def summary(reporter: Reporter, trainer: TrainerConfig, stages: Mapping[str, float]) -> str:
    """Return the summary of a run: losses, time, where the model is, how to open it, and the report.

    `stages`: seconds of each stage of this start.
    """
    folder = trainer.default_local_dir
    lines = [f"Done: {reporter.steps:,} steps, {reporter.tokens:,} tokens in {clock(reporter.seconds)}."]
    lines.append(f"Time: {longest_stages(stages)}.")

    total = sum(reporter.source_targets.values())
    for name, targets in reporter.source_targets.items():
        lines.append(f"  {name}: {targets:,} targets, {targets / total:.1%} of all")

    if reporter.validations:
        best = min(reporter.validations, key=lambda record: record["val/loss"])
        last = reporter.validations[-1]
        lines.append(
            f"Validation loss: last {last['val/loss']:.4f}, best {best['val/loss']:.4f} at step {int(best['step'])}."
        )
        lines += [f"  {name}: last {loss:.4f}" for name, loss in losses_by_name(last, "val").items()]
    if trainer.save_best_on is not None and reporter.validations:
        lines.append(f"The best checkpoint is {folder}/checkpoints/best.")

    if trainer.export == "adapter":
        lines += [
            f"The adapter is in {folder}/adapter:",
            "  from peft import AutoPeftModelForCausalLM",
            f'  model = AutoPeftModelForCausalLM.from_pretrained("{folder}/adapter")',
        ]
    else:
        lines += [
            f"The model is in {folder}:",
            "  from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'  model = AutoModelForCausalLM.from_pretrained("{folder}")',
            f'  tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        ]
    return "\n".join([*lines, "The run as a page:", f"  apollo-sft report {shlex.quote(folder)}"])


def longest_stages(stages: Mapping[str, float]) -> str:
    """Name the stages that took longest, in the order in which they ran."""
    longest = sorted(stages, key=lambda name: -stages[name])[:NAMED_STAGES]
    return ", ".join(f"{name} {clock(stages[name])}" for name in stages if name in longest)
