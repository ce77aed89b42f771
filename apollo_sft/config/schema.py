"""The configuration as frozen, strictly typed values. Defaults stand in sft_trainer.yaml, and only there."""

from __future__ import annotations

import os
import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

SAVE_FREQUENCIES = "-1, a number of steps such as 200, epoch, or minutes such as 30min"
ALL_OR_SOME = "-1, or 1 and more"


def _as_tuple(value: Any) -> Any:
    """A list, one text or dict for a list of one, or nothing."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str | dict) else tuple(value) if isinstance(value, list) else value


def _expand(value: Any) -> Any:
    """`~` and environment variables in paths."""
    if isinstance(value, str):
        return os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111 - a URL is no Path
    return [_expand(item) for item in value] if isinstance(value, list) else value


def _save_frequency(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        readable = value == -1 or value >= 1
    else:
        readable = isinstance(value, str) and re.fullmatch(r"epoch|[1-9][0-9]*min", value) is not None
    if not readable:
        raise ValueError(SAVE_FREQUENCIES)
    return value


def _all_or_some(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError(ALL_OR_SOME)
    return value


def _first_and_last(value: tuple[int, ...]) -> tuple[int, ...]:
    if value and (len(value) != 2 or value[0] > value[1]):
        raise ValueError("null, or the first and the last step, such as [10,12]")
    return value


def _day(value: str) -> str:
    date.fromisoformat(value)
    return value


def _name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_.-]+", value) is None:
        raise ValueError("letters, digits and _ . -: it becomes part of the names of metrics")
    return value


def _branch(value: Any) -> str:
    """Which of the two kinds an entry of a list of files is."""
    return "source" if isinstance(value, dict | BaseModel) else "path"


def _lower(value: Any) -> Any:
    """verl writes AdamW."""
    return value.lower() if isinstance(value, str) else value


def _short_dtype(value: Any) -> Any:
    """verl writes bfloat16 and bf16."""
    long_names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
    return long_names.get(value, value) if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Strings = Annotated[
    tuple[Text, ...], BeforeValidator(_as_tuple), Field(description="a text, or a list of them; or null")
]
PathText = Annotated[Text, BeforeValidator(_expand), Field(description="a path")]
Paths = Annotated[
    tuple[Text, ...],
    BeforeValidator(_as_tuple),
    BeforeValidator(_expand),
    Field(description="a path, or a list of them; or null"),
]
Count = Annotated[int, Field(ge=1)]
CountOrAll = Annotated[int, AfterValidator(_all_or_some), Field(description=ALL_OR_SOME)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileSet(Section):
    """Files that are counted apart from others, under a name. `named` in config.sources says how they are called."""

    path: Annotated[Paths, Field(min_length=1)]
    name: Annotated[Text, AfterValidator(_name)] | None = None


class Source(FileSet):
    """A part of a mixture; data.mixture says what the two numbers mean. At most one of them is given."""

    weight: Annotated[float, Field(gt=0)] | None = None
    max_samples: Count | None = None


TrainFiles = Annotated[
    tuple[
        Annotated[Annotated[Text, Tag("path")] | Annotated[Source, Tag("source")], Discriminator(_branch)],
        ...,
    ],
    BeforeValidator(_as_tuple),
    BeforeValidator(_expand),
    Field(description="a path, or a list of paths and of {path, weight or max_samples, name}; or null"),
]
ValFiles = Annotated[
    tuple[
        Annotated[Annotated[Text, Tag("path")] | Annotated[FileSet, Tag("source")], Discriminator(_branch)],
        ...,
    ],
    BeforeValidator(_as_tuple),
    BeforeValidator(_expand),
    Field(description="a path, or a list of paths, or of {path, name}; or null"),
]


class MultiturnConfig(Section):
    enable: bool
    messages_key: Text
    tools_key: str
    enable_thinking_key: str


class CustomClsConfig(Section):
    path: PathText | None
    name: Text | None


class DataConfig(Section):
    train_batch_size: Count
    micro_batch_size_per_gpu: Count
    train_files: TrainFiles
    val_files: ValFiles
    train_max_samples: CountOrAll
    val_max_samples: CountOrAll
    prompt_key: Text
    response_key: Text
    prompt_dict_keys: Strings
    response_dict_keys: Strings
    multiturn: MultiturnConfig
    max_length: Annotated[int, Field(ge=2)]
    truncation: Literal["error", "left", "right", "drop"]
    use_dynamic_bsz: bool
    max_token_len_per_gpu: Count | None
    balance_dp_token: bool
    drop_last: bool
    chat_template: Text | None
    apply_chat_template_kwargs: dict[str, Any]
    template_date: Annotated[str, AfterValidator(_day), Field(description="a day, as 2025-01-31")]
    history: Literal["expand", "last_turn", "as_rendered"]
    train_on: Literal["assistant", "all", "last"]
    train_key: str
    special_tokens_in_content: Literal["error", "drop", "allow"]
    bad_rows: Literal["error", "skip"]
    max_bad_ratio: Share
    store_dir: PathText | None
    custom_cls: CustomClsConfig


class WrapPolicyConfig(Section):
    min_num_params: Annotated[int, Field(ge=0)]
    transformer_layer_cls_to_wrap: Strings


class FsdpConfig(Section):
    wrap_policy: WrapPolicyConfig
    cpu_offload: bool
    offload_params: bool
    dtype: Annotated[Literal["auto", "fp32", "bf16", "fp64"], BeforeValidator(_short_dtype)]
    model_dtype: Annotated[Literal["fp32", "fp64", "bf16"], BeforeValidator(_short_dtype)]
    fsdp_size: CountOrAll
    reshard_after_forward: bool
    use_no_sync_for_gradient_accumulation: bool


class ModelConfig(Section):
    partial_pretrain: Annotated[PathText, Field(description="a folder, or a hub id")]
    strategy: Literal["fsdp2", "fsdp"]
    fsdp_config: FsdpConfig
    external_lib: Text | None
    enable_gradient_checkpointing: bool
    gradient_checkpointing_policy: Literal["full", "selective"]
    trust_remote_code: bool
    follow_links: bool
    attn_implementation: Literal["auto", "sdpa", "varlen", "flash"]
    lora_rank: Annotated[int, Field(ge=0)]
    lora_alpha: Count
    target_modules: Annotated[Text | Strings, Field(description="a text, or a list of them")]
    target_parameters: Strings
    exclude_modules: Annotated[Text | Strings, Field(description="a text, or a list of them")]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    use_rslora: bool
    use_dora: bool
    modules_to_save: Strings
    lora_adapter_path: PathText | None
    use_liger: bool
    compile: bool
    load_in_4bit: bool
    add_special_tokens: bool


class OptimConfig(Section):
    name: Annotated[Literal["adamw", "muon", "adamw_8bit"], BeforeValidator(_lower)]
    lr: Annotated[float, Field(gt=0)]
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], ...],
        Field(min_length=2, max_length=2),
        BeforeValidator(_as_tuple),
    ]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps_ratio: Share
    lr_warmup_steps: Annotated[int, Field(ge=-1)]
    clip_grad: Annotated[float, Field(ge=0)] | None
    lr_scheduler: Literal["cosine", "wsd"]
    min_lr_ratio: Share
    stable_ratio: Share


class CheckpointConfig(Section):
    save_contents: Annotated[
        tuple[Literal["model", "optimizer", "extra", "hf_model"], ...], Field(min_length=1), BeforeValidator(_as_tuple)
    ]
    hf_model_at: Literal["every", "best_and_last"]
    async_save: bool


class TrainerConfig(Section):
    default_local_dir: PathText
    default_hdfs_dir: PathText | None
    project_name: Text
    experiment_name: Text
    total_epochs: Count
    total_training_steps: Count | None
    logger: Strings
    log_freq: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    save_freq: Annotated[int | str, BeforeValidator(_save_frequency), Field(description=SAVE_FREQUENCIES)]
    test_freq: CountOrAll
    val_before_train: bool
    resume_mode: Literal["auto", "disable", "resume_path"]
    resume_from_path: PathText | None
    resume_with_changes: bool
    save_best_on: Literal["val/loss"] | None
    early_stop_patience: Count | None
    max_ckpt_to_keep: Count
    checkpoint: CheckpointConfig
    export: Literal["merged", "adapter", "both"]
    export_dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], BeforeValidator(_short_dtype)]
    generate_samples: Annotated[int, Field(ge=0)]
    nnodes: Count
    n_gpus_per_node: Count | None
    collective_timeout_seconds: Count
    peak_tflops: Annotated[float, Field(gt=0)] | None
    profile_steps: Annotated[tuple[Count, ...], AfterValidator(_first_and_last), BeforeValidator(_as_tuple)]
    deterministic: bool
    device: Literal["auto", "cuda", "cpu"]


class SftConfig(Section):
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    trainer: TrainerConfig
    ulysses_sequence_parallel_size: Count
    use_remove_padding: bool
