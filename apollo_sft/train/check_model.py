"""The model before its weights are read: its files, what is written at the end, and the room on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.model_folder.conversion import plan_export
from apollo_sft.checkpoint.model_folder.tensor_files import num_bytes, safe_path
from apollo_sft.checkpoint.model_folder.write import ADAPTER_FILE
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.checkpoint.room import free_bytes
from apollo_sft.checkpoint.run_folder.resume import whole_checkpoints
from apollo_sft.checkpoint.run_folder.state import num_bytes as checkpoint_bytes
from apollo_sft.config.schema import ModelConfig, OptimConfig, SftConfig, TrainerConfig
from apollo_sft.config.values import trains_adapter
from apollo_sft.errors import ConfigError
from apollo_sft.model import attention
from apollo_sft.model.load import build_on_meta
from apollo_sft.report.log import say
from apollo_sft.train.base_model import about_the_base, check_copied, in_words, no_weights, open_base
from apollo_sft.train.optim.build import build_optimizer, state_bytes
from apollo_sft.train.precision import DTYPES
from apollo_sft.types import AddedTokens, BaseModel


def check_model(config: SftConfig) -> dict[str, Any]:
    """Build the model without memory and compare it with its files and the disk, so that errors come early.

    Return what run.json records about the base's folder: which files are copied, and which are left out.
    Raises: ModelError, ConfigError.
    """
    model = config.model
    base, hf_config = open_base(config)
    if model.use_liger:
        from apollo_sft.model.liger import check_family

        check_family(model, hf_config.model_type)
    if not base.tensors:
        raise no_weights(base.folder)

    attention.register(attention.sdpa_kernel)  # its name must be known; nothing runs
    causal_lm = build_on_meta(hf_config, DTYPES[model.fsdp_config.model_dtype], model.trust_remote_code)
    with about_the_base():
        if (base.folder / "generation_config.json").is_file():
            read_json(base.folder / "generation_config.json")
        plan = plan_export(causal_lm, base, config.trainer.export_dtype)
        _check_layer_names(model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap, causal_lm)
        if model.lora_adapter_path is not None:
            for name in (ADAPTER_FILE, "adapter_config.json"):
                safe_path(Path(model.lora_adapter_path), name, model.follow_links)
    check_copied(base, plan.copied)
    if trains_adapter(model):
        _check_adapter(model, base, causal_lm)

    file_bytes = sum((base.folder / name).stat().st_size for name in base.carried)
    model_bytes = sum(map(num_bytes, plan.tensors.values())) + file_bytes
    _check_disk(config.trainer, config.optim, causal_lm, model_bytes, trains_adapter(model))

    for line in in_words(base, plan.copied, config.trainer.export != "adapter"):
        say(line)
    files = {"carried_files": base.carried, "files_left_out": base.left_out}
    return {"base": files | {"copied_tensors": plan.copied, "untied": base.untied}}


def _check_disk(trainer: TrainerConfig, optim: OptimConfig, causal_lm: Any, model_bytes: int, is_lora: bool) -> None:
    """Raise ConfigError unless the disk has room for two checkpoints and the finished model.

    A run that resumes has one of the checkpoints already.
    """
    root = Path(trainer.default_local_dir)
    contents = trainer.checkpoint.save_contents

    moments = state_bytes(build_optimizer(causal_lm, optim))
    one = checkpoint_bytes(causal_lm, moments, contents)
    if "hf_model" in contents:
        # With LoRA `hf/` is the adapter: as large as the weights of a checkpoint, which holds only what is trained.
        if is_lora:
            one += checkpoint_bytes(causal_lm, 0, ["model"])
        else:
            one += model_bytes

    # A new checkpoint is written before the oldest one is removed: for a moment there are two.
    needed = one
    if not any(whole_checkpoints(root / "checkpoints")):
        needed += one
    if trainer.export != "adapter":
        needed += model_bytes
    if free_bytes(root) < needed:
        raise ConfigError(
            f"trainer.default_local_dir={root} has no room for two checkpoints and the finished model",
            found=f"{free_bytes(root):,} bytes free",
            expected=f"{needed:,} bytes ({one:,} a checkpoint)",
            fix="make room, choose another trainer.default_local_dir, or leave hf_model out of "
            "trainer.checkpoint.save_contents",
        )


def _check_adapter(model: ModelConfig, base: BaseModel, causal_lm: Any) -> None:
    """Put the adapters into a model without memory. Raises: ConfigError, ModelError when they do not fit."""
    from apollo_sft.model.adapter_files import check_adapter_file
    from apollo_sft.model.lora import check_groups, inject, lora_config

    wanted = lora_config(model, base.source)
    if base.new_tokens is not None:
        raise _adapter_with_new_tokens(base.new_tokens)
    inject(causal_lm, wanted, DTYPES[model.fsdp_config.model_dtype])
    check_groups(causal_lm, model)
    if model.lora_adapter_path is not None:
        check_adapter_file(causal_lm, model.lora_adapter_path)


def _adapter_with_new_tokens(new_tokens: AddedTokens) -> ConfigError:
    return ConfigError(
        "model.add_special_tokens cannot be combined with LoRA: the adapter would depend on an enlarged base "
        "model that is not saved anywhere",
        found=f"{', '.join(new_tokens.tokens)}, missing from the base model",
        fix="model.lora_rank=0; or add them once, with transformers (add_tokens, resize_token_embeddings, "
        "save_pretrained), and train that folder with the embeddings in model.modules_to_save",
    )


def _check_layer_names(wanted: Sequence[str], causal_lm: Any) -> None:
    known = {type(module).__name__ for module in causal_lm.modules()}
    if wanted and not known & set(wanted):
        raise ConfigError(
            "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap names no module of this model",
            found=", ".join(wanted),
            expected=f"one of {', '.join(sorted(known))}",
        )
