"""What the config alone shows to be impossible, and the paths that it names. No torch, no data is opened."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os.path
import re
import sys
from collections.abc import Iterator

from apollo_sft.config.schema import KEYS, DataConfig, FsdpConfig, ModelConfig, OptimConfig, SftConfig, TrainerConfig
from apollo_sft.config.sources import paths_of, refused
from apollo_sft.errors import ConfigError

LOGGERS = ("console", "tensorboard", "wandb", "mlflow", "swanlab", "trackio", "file")


def check_combinations(config: SftConfig, given: set[str], notes: list[str]) -> None:
    """Check how keys go together, and add to `notes` what is accepted but should be known.

    `given`: the keys that the user has set.

    Raises: ConfigError with every impossible combination in one message.
    """
    data = config.data
    model = config.model
    trainer = config.trainer
    checks = (
        _batches(data),
        _files(data, given),
        refused(data),
        _precision(model.fsdp_config),
        _exclusions(model),
        _four_bits(model, trainer.device),
        _compiled(model),
        _loggers(trainer.logger),
        _warm_up(config.optim, given),
        _columns(data, given),
        _adapter(model, trainer.export),
        _kernel(model, trainer.device),
        _checkpoints(trainer, data),
    )
    problems = [str(problem) for check in checks for problem in check]
    if problems:
        raise ConfigError("\n".join(problems))
    if config.use_remove_padding:
        notes.append("use_remove_padding changes nothing: there never is padding")
    if model.fsdp_config.model_dtype == "bf16":
        notes.append(
            "warning: model.fsdp_config.model_dtype=bf16 loses small updates: at lr 1e-5 most weights of usual size "
            "do not move at all; fp32 is the safe choice"
        )
    notes += _without_effect(config, given)


def _without_effect(config: SftConfig, given: set[str]) -> Iterator[str]:
    """A key that was set and changes nothing is said, not ignored."""
    for name, key in KEYS.items():
        if name in given and key.unused is not None and key.unused.holds(config):
            yield f"{name} has no effect {key.unused.when}"


def check_paths(data: DataConfig, model: ModelConfig, given: set[str]) -> None:
    """Local files that the config names must exist. `given`: the keys that the user has set.

    Raises: ConfigError naming every key whose file is not there.
    """
    problems = [str(problem) for problem in _missing(data, model, given)]
    if problems:
        raise ConfigError("\n".join(problems))


def _missing(data: DataConfig, model: ModelConfig, given: set[str]) -> Iterator[ConfigError]:
    for key, paths, off in (
        ("data.train_files", data.train_files, "data.train_files=path/to/train.parquet"),
        ("data.val_files", data.val_files, "data.val_files=null, or data.val_files=path/to/val.parquet"),
    ):
        for path in paths_of(paths):
            if "://" not in without_file_scheme(path) and not _exists(without_file_scheme(path)):
                fix = f"a list is written {key}=[{path}]" if "," in path else off
                yield ConfigError(f"{_named(key, given)}: no such file", found=path, fix=fix)
    base = model.partial_pretrain
    if _is_path(base) and not os.path.isdir(base):  # noqa: PTH112
        key = _named("model.partial_pretrain", given)
        fix = "model.partial_pretrain=path/to/model, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        yield ConfigError(f"{key}: no such folder", found=base, fix=fix)
    template = data.chat_template
    if template is not None and _is_path(template) and not _is_file(template):
        fix = "data.chat_template=null for the tokenizer's own, or chatml, plain, jinja text"
        yield ConfigError("data.chat_template: no such file", found=template, fix=fix)
    external = model.external_lib
    if external is not None and not _is_module(external.partition(".")[0]):
        yield ConfigError("model.external_lib cannot be found", found=external, expected="a module on PYTHONPATH")


def without_file_scheme(path: str) -> str:
    """A local path of a `file://` URL; everything else as it is."""
    return path.removeprefix("file://") if path.startswith("file:///") else path


def is_hub_data_set(path: str) -> bool:
    """Return whether it reads as `owner/name` on the hub: no extension of data, no local folder of the owner's name."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?", path) is not None
    is_file = re.search(r"\.(parquet|pq|jsonl?|ndjson|arrow|feather|ipc|csv|tsv|txt|gz|zst|zip)$", path) is not None
    return named and not is_file and not os.path.isdir(path.partition("/")[0])  # noqa: PTH112


def _is_module(name: str) -> bool:
    return name.isidentifier() and (name in sys.modules or importlib.util.find_spec(name) is not None)


def _is_path(text: str) -> bool:
    """Clearly a local path: a hub id is `name` or `owner/name`, and a template that is text has braces."""
    return "{" not in text and (text.startswith(("/", ".", "~")) or text.count("/") > 1)


def _named(key: str, given: set[str]) -> str:
    return key if key in given else f"{key} (its default)"


def _exists(path: str) -> bool:
    """os.path, here and below: a name that is too long or lies in a folder that may not be read is no traceback."""
    is_there = os.path.exists(path) or is_hub_data_set(path)  # noqa: PTH110
    return is_there or bool(glob.has_magic(path) and glob.glob(path, recursive=True))  # noqa: PTH207


def _is_file(path: str) -> bool:
    return os.path.isfile(os.path.expanduser(path))  # noqa: PTH111, PTH113


def _batches(data: DataConfig) -> Iterator[ConfigError]:
    if data.micro_batch_size_per_gpu > data.train_batch_size and not data.use_dynamic_bsz:
        yield ConfigError(
            "data.micro_batch_size_per_gpu is larger than data.train_batch_size",
            found=f"{data.micro_batch_size_per_gpu} samples a forward, {data.train_batch_size} samples a step",
            fix=f"data.micro_batch_size_per_gpu={data.train_batch_size} or less",
        )
    if data.max_token_len_per_gpu is not None and not data.use_dynamic_bsz:
        yield ConfigError(
            "data.max_token_len_per_gpu has an effect only with data.use_dynamic_bsz=true",
            found=data.max_token_len_per_gpu,
            fix="data.max_token_len_per_gpu=null",
        )
    if data.use_dynamic_bsz and data.max_token_len_per_gpu is None:
        yield ConfigError(
            "data.use_dynamic_bsz=true needs data.max_token_len_per_gpu",
            expected="the most tokens of one forward, for example 8192",
        )


def _files(data: DataConfig, given: set[str]) -> Iterator[ConfigError]:
    if "data.train_files" in given and "data.val_files" not in given and data.val_files:
        yield ConfigError(
            "data.train_files is yours, but data.val_files is still the default",
            found=", ".join(paths_of(data.val_files)),
            expected="validation data that belongs to the training data",
            fix="set data.val_files, or data.val_files=null to train without validation",
        )
    if not data.train_files:
        yield ConfigError("data.train_files names no file", fix="data.train_files=path/to/train.parquet")


def _precision(fsdp: FsdpConfig) -> Iterator[ConfigError]:
    master = fsdp.model_dtype
    compute = fsdp.dtype
    allowed = {"fp64": ("auto", "fp64"), "fp32": ("auto", "fp32", "bf16"), "bf16": ("auto", "bf16")}[master]
    if compute not in allowed:
        yield ConfigError(
            "model.fsdp_config.dtype does not go with model.fsdp_config.model_dtype",
            found=f"dtype={compute}, model_dtype={master}",
            expected=f"dtype={' or '.join(allowed)} with model_dtype={master}",
        )


def _exclusions(model: ModelConfig) -> Iterator[ConfigError]:
    """PEFT reads `target_modules` in the same way, but knows `all-linear` there."""
    excluded = model.exclude_modules
    try:
        re.compile(excluded if isinstance(excluded, str) else "")
    except re.error as error:
        yield ConfigError(
            "model.exclude_modules is no regular expression, which one text is read as",
            found=f"{excluded} ({error})",
            expected=r"an expression of full names such as '.*\.layers\.0\..*', or a list of ends of names: [o_proj]",
        )


def _four_bits(model: ModelConfig, device: str) -> Iterator[ConfigError]:
    if not model.load_in_4bit:
        return
    if model.lora_rank == 0 and model.lora_adapter_path is None:
        yield ConfigError(
            "model.load_in_4bit=true needs LoRA: weights in 4 bits cannot be trained themselves",
            fix="model.lora_rank=16, or model.load_in_4bit=false",
        )
    if device == "cpu":
        yield ConfigError(
            "model.load_in_4bit=true needs CUDA", found="trainer.device=cpu", fix="model.load_in_4bit=false"
        )
    if model.strategy == "fsdp":
        yield ConfigError(
            "model.load_in_4bit=true needs model.strategy=fsdp2: FSDP1 casts all weights of a layer alike",
            found="model.strategy=fsdp",
            fix="model.strategy=fsdp2",
        )
    if model.fsdp_config.model_dtype == "fp64":
        yield ConfigError(
            "model.load_in_4bit=true knows no float64",
            found="model.fsdp_config.model_dtype=fp64",
            fix="model.fsdp_config.model_dtype=fp32",
        )


def _compiled(model: ModelConfig) -> Iterator[ConfigError]:
    if model.compile and model.enable_gradient_checkpointing and model.gradient_checkpointing_policy == "selective":
        yield ConfigError(
            "model.compile=true does not go with selective checkpointing: compiled layers show no operators to select",
            found="model.gradient_checkpointing_policy=selective",
            fix="model.gradient_checkpointing_policy=full, or model.compile=false",
        )
    if model.compile and model.load_in_4bit:
        yield ConfigError("model.compile=true does not go with model.load_in_4bit=true", fix="model.compile=false")


def _loggers(names: tuple[str, ...]) -> Iterator[ConfigError]:
    if len(set(names)) < len(names):
        yield ConfigError("trainer.logger names one twice", found=", ".join(names))
    for name in names:
        if name not in LOGGERS:
            close = difflib.get_close_matches(name, LOGGERS, n=1)
            fix = f"did you mean {close[0]}?" if close else None
            yield ConfigError("trainer.logger is unknown", found=name, expected=", ".join(LOGGERS), fix=fix)


def _checkpoints(trainer: TrainerConfig, data: DataConfig) -> Iterator[ConfigError]:
    if (trainer.resume_mode == "resume_path") != (trainer.resume_from_path is not None):
        yield ConfigError(
            "trainer.resume_mode=resume_path and trainer.resume_from_path go together",
            found=f"trainer.resume_mode={trainer.resume_mode}, trainer.resume_from_path={trainer.resume_from_path}",
            fix="set both, or neither",
        )
    for key in ("save_best_on", "early_stop_patience"):
        if getattr(trainer, key) is not None and not data.val_files:
            yield ConfigError(
                f"trainer.{key} needs validation data", found="data.val_files=null", fix="set data.val_files"
            )
    contents = trainer.checkpoint.save_contents
    if "model" not in contents and contents != ("hf_model",):
        yield ConfigError(
            "trainer.checkpoint.save_contents has parts that are of no use without model",
            found=", ".join(contents),
            expected="model, optimizer and extra to go on from; or model, or hf_model, alone",
        )


def _warm_up(optim: OptimConfig, given: set[str]) -> Iterator[ConfigError]:
    if optim.lr_warmup_steps >= 0 and "optim.warmup_steps_ratio" in given:
        yield ConfigError(
            "optim.lr_warmup_steps and optim.warmup_steps_ratio both say how long the warm-up is",
            fix="give one of them",
        )


def _columns(data: DataConfig, given: set[str]) -> Iterator[ConfigError]:
    """Refuse keys of two forms of data, of which one could only be ignored."""
    if "data.multiturn.messages_key" in given and not data.multiturn.enable:
        yield ConfigError(
            "data.multiturn.messages_key is set, but data.multiturn.enable is false",
            fix="data.multiturn.enable=true for conversations, or leave the key out",
        )
    columns = [f"data.{key}" for key in ("prompt_key", "response_key") if f"data.{key}" in given]
    if columns and data.multiturn.enable:
        yield ConfigError(
            f"{' and '.join(columns)} and data.multiturn.enable=true name two forms of data",
            fix="leave out the columns of single-turn data, or data.multiturn.enable",
        )
    custom = data.custom_cls
    if (custom.name is None) != (custom.path is None):
        yield ConfigError(
            "data.custom_cls.path and data.custom_cls.name go together",
            found=f"path {custom.path}, name {custom.name}",
            fix="set both, or neither",
        )


def _adapter(model: ModelConfig, export: str) -> Iterator[ConfigError]:
    lora = model.lora_rank > 0 or model.lora_adapter_path is not None
    named = model.target_modules or model.target_parameters
    if model.lora_rank > 0 and not named and model.lora_adapter_path is None:
        yield ConfigError(
            "model.target_modules is empty: LoRA would train nothing",
            fix="model.target_modules=all-linear, or model.lora_rank=0",
        )
    if export == "adapter" and not lora:
        yield ConfigError(
            "trainer.export=adapter needs LoRA: there would be nothing to save",
            fix="trainer.export=merged, or model.lora_rank",
        )


def _kernel(model: ModelConfig, device: str) -> Iterator[ConfigError]:
    attention = model.attn_implementation
    if device == "cpu" and attention in ("flash", "varlen"):
        yield ConfigError(
            f"model.attn_implementation={attention} needs CUDA",
            found="trainer.device=cpu",
            fix="model.attn_implementation=auto",
        )
