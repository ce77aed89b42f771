"""Export a model folder from a checkpoint, in one process and without a GPU, by the code that ends a run.

Training does not come here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.model_folder.reopen import verify_model_folder
from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.write import ExportOptions, model_form, save_model
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.checkpoint.run_folder.folder import read_run
from apollo_sft.checkpoint.run_folder.lookup import config_of, find_run, trained_stops
from apollo_sft.checkpoint.run_folder.state import StateFiles
from apollo_sft.config.schema import DataConfig, ModelConfig
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.errors import ConfigError, DataError
from apollo_sft.model import attention
from apollo_sft.model.four_bit import quantised
from apollo_sft.model.load import build_on_meta, load_with_weights
from apollo_sft.model.lora import inject, lora_config, merge
from apollo_sft.train.base_model import load_tokenizer, open_base
from apollo_sft.train.finish import IN_CHECKPOINT, options_of
from apollo_sft.train.precision import DTYPES, resolve_precision
from apollo_sft.train.process import load_external_lib
from apollo_sft.types import BaseModel, Conversation, RowRef


def export_checkpoint(checkpoint: Path, out: Path, export_dtype: str | None = None) -> list[str]:
    """Write the model of `checkpoint` into `out`, a LoRA adapter merged into its base. Return notes for the user.

    Nothing in `out` is replaced but a model of an earlier export. `export_dtype`: of the files; None is that of the
    run's config. The base model must be where it was.
    Raises: ConfigError, ModelError, CheckpointError; nothing is visible in `out` then.
    """
    _check_out(out)
    notes: list[str] = []
    resume.check_files(checkpoint)
    facts = resume.read_facts(checkpoint)
    if "model" not in facts["contents"]:
        fix = None
        if (checkpoint / "hf").is_dir():
            fix = f"its model folder is {checkpoint / 'hf'}"
        raise ConfigError(
            f"{checkpoint} holds no weights to export",
            found=f"trainer.checkpoint.save_contents={facts['contents']}",
            expected="model among them",
            fix=fix,
        )

    config = config_of(facts["config"])
    load_external_lib(config.model.external_lib)
    base, hf_config = open_base(config)
    dtype = export_dtype or config.trainer.export_dtype
    options = _options(config.model, config.data, base, checkpoint, dtype)

    out.mkdir(parents=True, exist_ok=True)
    notes += publish.recover(out)
    # A full model is written from its files, tensor by tensor. Merging needs the base in memory.
    if lora_config(config.model, base.source) is None:
        _write_full(config.model, base, hf_config, checkpoint, (out, options))
    else:
        save_model(_merged(config.model, base, hf_config, checkpoint), base, out, options, is_writer=True)

    return notes


def probed_stops(tokenizer: Any, template: ChatTemplate, data: DataConfig) -> tuple[int, ...]:
    """Return the tokens by which the template ends a reply, found by rendering one; () when that fails."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        renderer = Renderer(tokenizer, template, data)
        renderer.render([Conversation(messages, None, {}, RowRef("a probe", 0))])
    except DataError:
        return ()

    return tuple(token for token, _ in renderer.counts.stop_tokens.most_common())


def _check_out(out: Path) -> None:
    """Refuse a folder with files that no export wrote. Raises: ConfigError."""
    if read_run(out) is not None:
        raise ConfigError(f"{out} is the folder of a run", fix="export into another folder; nothing was changed")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is not a folder", expected="a new or empty folder, or one of an earlier export")
    if (out / publish.LAST).exists() and publish.LAST not in publish.model_files(out):
        raise ConfigError(
            f"{out} holds a model that no export wrote", fix="export into another folder; nothing was changed"
        )


def _options(
    model: ModelConfig, data: DataConfig, base: BaseModel, checkpoint: Path, export_dtype: str
) -> ExportOptions:
    tokenizer = load_tokenizer(base.folder, model.trust_remote_code)
    template = fit_template(tokenizer, data, model.add_special_tokens)
    stops = trained_stops(find_run(checkpoint))
    if stops is None:
        stops = probed_stops(tokenizer, template, data)
    return options_of(tokenizer, template, stops, export_dtype, model.trust_remote_code)


def _write_full(
    model: ModelConfig, base: BaseModel, hf_config: Any, checkpoint: Path, to: tuple[Path, ExportOptions]
) -> None:
    """Write all weights tensor by tensor: the model is never in memory as a whole."""
    out, options = to
    attention.register(attention.sdpa_kernel)  # its name must be known; nothing runs
    causal_lm = build_on_meta(hf_config, DTYPES[model.fsdp_config.model_dtype], model.trust_remote_code)
    form = model_form(causal_lm, IN_CHECKPOINT, base, options)
    staging = publish.staging_folder(out, "model")
    form.write_to(staging, StateFiles(checkpoint))  # reads back every byte

    def check(folder: Path) -> None:
        verify_model_folder(folder, form.plan.tensors, None, options.trust_remote_code)

    publish.publish_model(staging, out, check)


@torch.no_grad()
def _merged(model: ModelConfig, base: BaseModel, hf_config: Any, checkpoint: Path) -> Any:
    """Return the base with the adapter of a checkpoint merged in. Weights of a run in 4 bits are in 4 bits again."""
    attention.register(attention.sdpa_kernel)
    master = DTYPES[model.fsdp_config.model_dtype]
    adapter = lora_config(model, base.source)
    # The run read what it then held in 4 bits in the dtype of its forwards; from another one other codes would come.
    stored = master
    if model.load_in_4bit:
        stored = resolve_precision(model, on_cuda=True).compute

    read = load_with_weights(base.folder, hf_config, stored, model.trust_remote_code)
    causal_lm = quantised(model, read, adapter)
    inject(causal_lm, adapter, master)

    state = StateFiles(checkpoint)
    for name, parameter in causal_lm.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(state.read(f"{IN_CHECKPOINT}{name}"))

    merge(causal_lm, cast)
    return causal_lm
