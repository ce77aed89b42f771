"""The end of a run that trained an adapter: the adapter's folder, and the model with it merged in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.write import (
    AdapterFolder,
    AdapterForm,
    ExportOptions,
    save_adapter,
    save_model,
)
from apollo_sft.config.schema import ModelConfig, TrainerConfig
from apollo_sft.model.adapter_files import adapter_tensors, saved_config, trained
from apollo_sft.model.lora import merge
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.train.finish import export_options
from apollo_sft.train.merged import check_merged, live_loss, probe_of
from apollo_sft.train.precision import resolve_precision
from apollo_sft.train.prepare_run import Prepared
from apollo_sft.train.strategy import strategy_of


def export_adapter(
    keys: ModelConfig, trainer: TrainerConfig, prepared: Prepared, model: SftModel, root: Path, world: World
) -> None:
    """Write the adapter and, unless `trainer.export` is adapter, the merged model into `root`. Every rank calls it.

    Raises: CheckpointError when what was written is not what was to be written.
    """
    # First: merging changes the weights of the model, and the check needs the loss of the model as it was trained.
    check = _merged_check(keys, prepared, model, world)
    model = strategy_of(model).as_row_sharded(model)
    options = export_options(prepared, trainer.export_dtype, keys.trust_remote_code)

    written = AdapterFolder(saved_config(model.causal_lm), prepared.base, options)
    save_adapter(adapter_tensors(model.causal_lm), written, root, model, world.is_main)
    if trainer.export == "adapter":
        return

    merge(model.causal_lm, cast)
    save_model(model.causal_lm, prepared.base, root, options, world.is_main, check)


def adapter_form(prepared: Prepared, causal_lm: Any, prefix: str, options: ExportOptions) -> AdapterForm:
    """Return how a checkpoint writes the adapter's folder. `prefix`: of the names of parameters in a checkpoint."""
    parameters = list(trained(causal_lm))
    names = {in_file: f"{prefix}{name}" for in_file, name, _ in parameters}
    num_bytes = sum(parameter.numel() * parameter.element_size() for _, _, parameter in parameters)
    written = AdapterFolder(saved_config(causal_lm), prepared.base, options)
    return AdapterForm(names, written, num_bytes)


def _merged_check(keys: ModelConfig, prepared: Prepared, model: SftModel, world: World) -> Callable[[Path], None]:
    """Return the check that the merged model must pass before it is visible. Collective: all ranks compute the loss."""
    probe = probe_of(prepared.train)
    live = live_loss(model, probe, world)
    computed = resolve_precision(keys, world.device.type == "cuda").compute
    return lambda written: check_merged(written, probe, live, computed, keys.trust_remote_code)
