"""The model before its weights are read: its files, what is written at the end, and the room on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.disk import free_bytes
from apollo_sft.checkpoint.model_folder.conversion import plan_export
from apollo_sft.checkpoint.model_folder.tensor_files import num_bytes, safe_path
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.checkpoint.run_folder.resume import whole_checkpoints
from apollo_sft.checkpoint.run_folder.state import num_bytes as checkpoint_bytes
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError
from apollo_sft.model import attention, liger
from apollo_sft.model.load import build_on_meta
from apollo_sft.model.lora import ADAPTER_FILE, check_adapter_file, check_groups, inject, lora_config
from apollo_sft.report.log import say
from apollo_sft.train.base_model import about_the_base, check_copied, in_words, no_weights, open_base
from apollo_sft.train.optim.build import build_optimizer, state_bytes
from apollo_sft.train.precision import DTYPES
from apollo_sft.types import Growth


def check_model(config: SftConfig) -> dict[str, Any]:
    """Build the model without memory and hold it against its files and the disk: what would else fail much later.

    Returns what run.json says of the base's folder: what is carried over, written as it is, left out.
    Raises: ModelError, ConfigError.
    """
    base, hf_config = open_base(config)
    liger.check_family(config.model, hf_config.model_type)
    if not base.tensors:
        raise no_weights(base.folder)
    attention.register(attention.sdpa_kernel)  # its name must be known; nothing runs
    master = DTYPES[config.model.fsdp_config.model_dtype]
    causal_lm = build_on_meta(hf_config, master, config.model.trust_remote_code)
    adapter = config.model.lora_adapter_path
    with about_the_base():
        if (base.folder / "generation_config.json").is_file():
            read_json(base.folder / "generation_config.json")
        plan = plan_export(causal_lm, base, config.trainer.export_dtype)
        _check_layer_names(config, causal_lm)
        for name in (ADAPTER_FILE, "adapter_config.json") if adapter is not None else ():
            safe_path(Path(str(adapter)), name, config.model.follow_links)
    check_copied(base, plan.copied)
    wanted = lora_config(config.model, base.source)
    if wanted is not None and base.growth is not None:
        raise _adapter_on_grown(base.growth)
    if wanted is not None:
        inject(causal_lm, wanted, master)
        check_groups(causal_lm, config.model)
    if adapter is not None:
        check_adapter_file(causal_lm, adapter)
    files_bytes = sum((base.folder / name).stat().st_size for name in base.carried)
    _check_disk(config, causal_lm, sum(map(num_bytes, plan.tensors.values())) + files_bytes, wanted is not None)
    for line in in_words(base, plan.copied, config.trainer.export != "adapter"):
        say(line)
    files = {"carried_files": base.carried, "files_left_out": base.left_out}
    return {"base": files | {"copied_tensors": plan.copied, "untied": base.untied}}


def _check_disk(config: SftConfig, causal_lm: Any, model_bytes: int, is_lora: bool) -> None:
    """The disk must hold two checkpoints and the finished model. A run that goes on has one of them already.

    Raises: ConfigError.
    """
    root, contents = Path(config.trainer.default_local_dir), config.trainer.checkpoint.save_contents
    hf_bytes = checkpoint_bytes(causal_lm, 0, ["model"]) if is_lora else model_bytes
    moments = state_bytes(build_optimizer(causal_lm, config.optim))
    one = checkpoint_bytes(causal_lm, moments, contents) + ("hf_model" in contents) * hf_bytes
    has_one = any(whole_checkpoints(root / "checkpoints"))
    needed = (1 if has_one else 2) * one + (config.trainer.export != "adapter") * model_bytes
    if free_bytes(root) < needed:
        raise ConfigError(
            f"trainer.default_local_dir={root} has no room for two checkpoints and the finished model",
            found=f"{free_bytes(root):,} bytes free",
            expected=f"{needed:,} bytes ({one:,} a checkpoint)",
            fix="make room, choose another trainer.default_local_dir, or leave hf_model out of "
            "trainer.checkpoint.save_contents",
        )


def _adapter_on_grown(growth: Growth) -> ConfigError:
    return ConfigError(
        "model.add_special_tokens with LoRA: the adapter would be one of a model that is nowhere in a folder",
        found=f"{', '.join(growth.tokens)}, which the base model does not know",
        fix="model.lora_rank=0; or add them once, with transformers (add_tokens, resize_token_embeddings, "
        "save_pretrained), and train that folder with the embeddings in model.modules_to_save",
    )


def _check_layer_names(config: SftConfig, causal_lm: Any) -> None:
    wanted = config.model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap
    known = {type(module).__name__ for module in causal_lm.modules()}
    if wanted and not known & set(wanted):
        raise ConfigError(
            "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap names no module of this model",
            found=", ".join(wanted),
            expected=f"one of {', '.join(sorted(known))}",
        )
