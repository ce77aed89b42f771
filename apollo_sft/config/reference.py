"""The part of docs/configuration.md that is made from the schema, the yaml and the table of spellings.

`python -m apollo_sft.config.reference docs/configuration.md` writes it anew, between two marks; the rest stays.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_sft.config.aliases import REFUSED, REFUSED_SECTIONS, RENAMED, WITHOUT_EFFECT
from apollo_sft.config.checks import LOGGERS
from apollo_sft.config.compose import YAML_PATH
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError

BEGIN = "<!-- Made by `make docs-reference` from the schema, the yaml and the aliases. Do not edit from here on. -->"
END = "<!-- End of what is made. -->"
TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "object": "dict"}
CHOICES = {"trainer.logger": LOGGERS}
"""What the schema leaves to the cross-checks."""
MULTITURN = "data.multiturn.enable=true"
LORA = "model.lora_rank=16"
WITH = {
    "data.max_token_len_per_gpu": "data.use_dynamic_bsz=true",
    "data.use_dynamic_bsz": "data.max_token_len_per_gpu=8192",
    "data.train_files": "data.val_files=val.parquet",
    "data.multiturn.messages_key": MULTITURN,
    "data.multiturn.tools_key": MULTITURN,
    "data.multiturn.enable_thinking_key": MULTITURN,
    "data.custom_cls.path": "data.custom_cls.name=Chats",
    "data.custom_cls.name": "data.custom_cls.path=my_data.py",
    "model.fsdp_config.dtype": "model.fsdp_config.model_dtype=fp32",
    "model.fsdp_config.model_dtype": "model.fsdp_config.dtype=fp64",
    "model.gradient_checkpointing_policy": "model.enable_gradient_checkpointing=true",
    "model.lora_alpha": LORA,
    "model.load_in_4bit": LORA,
    "data.max_bad_ratio": "data.bad_rows=skip",
    "model.target_modules": LORA,
    "model.target_parameters": LORA,
    "model.exclude_modules": LORA,
    "model.lora_dropout": LORA,
    "model.use_rslora": LORA,
    "model.use_dora": LORA,
    "model.modules_to_save": LORA,
    "optim.stable_ratio": "optim.lr_scheduler=wsd",
    "trainer.resume_mode": "trainer.resume_from_path=other_run/checkpoints/step_000200",
    "trainer.resume_from_path": "trainer.resume_mode=resume_path",
    "trainer.export": LORA,
}
"""What an example sets besides its own key, without which that would be refused or change nothing."""
EXAMPLES = {
    "data.train_batch_size": "64",
    "data.micro_batch_size_per_gpu": "8",
    "data.train_files": "[a.parquet,b.parquet]",
    "data.val_files": "val.parquet",
    "data.train_max_samples": "1000",
    "data.val_max_samples": "200",
    "data.prompt_key": "prompt",
    "data.response_key": "response",
    "data.prompt_dict_keys": "[extra,question]",
    "data.response_dict_keys": "[extra,answer]",
    "data.multiturn.messages_key": "conversation",
    "data.multiturn.tools_key": "functions",
    "data.multiturn.enable_thinking_key": "thinking",
    "data.max_length": "4096",
    "data.truncation": "drop",
    "data.max_token_len_per_gpu": "16384",
    "data.chat_template": "chatml",
    "data.apply_chat_template_kwargs": "{enable_thinking: false}",
    "data.template_date": "2026-01-31",
    "data.history": "last_turn",
    "data.train_on": "last",
    "data.train_key": "use_this_row",
    "data.special_tokens_in_content": "drop",
    "data.max_bad_ratio": "0.2",
    "data.store_dir": "~/stores",
    "data.custom_cls.path": "my_data.py",
    "data.custom_cls.name": "Chats",
    "model.partial_pretrain": "Qwen/Qwen2.5-0.5B-Instruct",
    "model.fsdp_config.wrap_policy.min_num_params": "100000000",
    "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap": "[Qwen2DecoderLayer]",
    "model.fsdp_config.dtype": "bf16",
    "model.fsdp_config.model_dtype": "fp64",
    "model.fsdp_config.fsdp_size": "8",
    "model.external_lib": "my_package.my_models",
    "model.attn_implementation": "sdpa",
    "model.lora_rank": "16",
    "model.lora_alpha": "32",
    "model.target_modules": "[q_proj,v_proj]",
    "model.target_parameters": "[experts.down_proj]",
    "model.exclude_modules": "[o_proj]",
    "model.lora_dropout": "0.05",
    "model.modules_to_save": "[lm_head]",
    "model.lora_adapter_path": "earlier_run/adapter",
    "optim.lr": "2e-5",
    "optim.betas": "[0.9,0.999]",
    "optim.weight_decay": "0.1",
    "optim.warmup_steps_ratio": "0.03",
    "optim.lr_warmup_steps": "100",
    "optim.clip_grad": "null",
    "optim.min_lr_ratio": "0.1",
    "optim.stable_ratio": "0.8",
    "trainer.default_local_dir": "runs/first",
    "trainer.default_hdfs_dir": "s3://bucket/runs/first",
    "trainer.project_name": "my-project",
    "trainer.experiment_name": "lr-2e-5",
    "trainer.total_epochs": "2",
    "trainer.total_training_steps": "500",
    "trainer.logger": "[console,tensorboard]",
    "trainer.log_freq": "10",
    "trainer.seed": "7",
    "trainer.save_freq": "30min",
    "trainer.test_freq": "100",
    "trainer.resume_mode": "resume_path",
    "trainer.resume_from_path": "other_run/checkpoints/step_000200",
    "trainer.max_ckpt_to_keep": "5",
    "trainer.save_best_on": "val/loss",
    "trainer.early_stop_patience": "3",
    "trainer.checkpoint.save_contents": "[model,optimizer,extra]",
    "trainer.generate_samples": "4",
    "trainer.nnodes": "2",
    "trainer.n_gpus_per_node": "8",
    "trainer.collective_timeout_seconds": "3600",
    "trainer.peak_tflops": "989",
    "trainer.profile_steps": "[10,12]",
    "trainer.deterministic": "true",
    "trainer.device": "cpu",
    "trainer.export": "both",
    "ulysses_sequence_parallel_size": "2",
}
"""A value that a person might give. true/false and a choice of two need none: the example is the other one."""
LINK = re.compile(r"\bdocs/(\w+\.md)\b")
LITERAL = re.compile(
    r"(?P<kept>`[^`]*`|\[[^\]]*\]\([^)]*\))"  # what is Markdown already
    r"|<\|.*?\|>"  # control tokens
    r"|\{[^}]*\}|\[[^\])]*\]"  # dicts and lists
    r"|'[^']*[/*][^']*'"  # quoted globs
    r"|previous-<time>/"
    r"|apollo-sft [a-z]+(?: --[a-z]+)?"
    r"|[~$./\w*-]*[_/*=~][\w./*=+-]*\w/?|\b[a-z]+/(?!\w)"  # names with _ / * and assignments; folders
    r"|\b[a-z]\w*(?:\.[a-z]\w*)+"  # keys and files
    r"|\b(?:null|true|false)\b"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A key or a section of the yaml, in its order. `default` is as it is written there; None for a section."""

    key: str
    meaning: str
    default: str | None


def entries(text: str) -> Iterator[Entry]:
    """Keys and sections of a yaml in block style, each with the comment above it."""
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        content = line.strip()
        if content.startswith("#"):
            comment.append(content.lstrip("# "))
            continue
        if content:
            depth = (len(line) - len(line.lstrip())) // 2
            name, _, default = content.partition(":")
            path = [*path[:depth], name]
            yield Entry(".".join(path), " ".join(comment), default.strip() or None)
        comment = []


def example(key: str) -> str:
    """Overrides that set the key, as they are given on a command line.

    Raises: ConfigError where nobody has written one.
    """
    shape = _shape(key)
    default = _defaults()[key]
    if key in EXAMPLES:
        value = EXAMPLES[key]
    elif shape.get("type") == "boolean":
        value = {"true": "false", "false": "true"}[default]
    elif "enum" in shape:
        value = next(choice for choice in shape["enum"] if choice != default)
    else:
        raise ConfigError(
            f"{key} has no example in the reference", fix="add a value to EXAMPLES of config/reference.py"
        )
    own = f"{key}={value}"
    return " ".join([f'"{own}"' if " " in own else own, *([WITH[key]] if key in WITH else [])])


def kind(key: str) -> str:
    """Type and range or choices, for a person."""
    choices = CHOICES.get(key)
    return f"any of {_coded(choices)}" if choices else _spoken(_shape(key))


def generated() -> str:
    """The reference in Markdown: every key, then the other spellings."""
    return "\n\n".join(["## Every key", *_reference(), *_spellings()])


def renewed(page: str) -> str:
    """The page with the made part as it should be. Raises: ConfigError when the page lacks the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError("the page has no place for the reference", expected=f"a line {BEGIN} and later a line {END}")
    return f"{before}{BEGIN}\n\n{generated()}\n\n{END}{after}"


def _defaults() -> dict[str, str]:
    found = entries(YAML_PATH.read_text(encoding="utf-8"))
    return {entry.key: entry.default for entry in found if entry.default is not None}


def _reference() -> Iterator[str]:
    section = ""
    for entry in entries(YAML_PATH.read_text(encoding="utf-8")):
        top = entry.key.partition(".")[0] if entry.default is None or "." in entry.key else "Without a section"
        if top != section:
            section = top
            yield f"### {f'`{top}`' if top in SftConfig.model_fields else top}"
        if entry.default is None:
            if entry.meaning:
                yield f"#### `{entry.key}`\n\n*A section.* {_marked(entry.meaning)}"
            continue
        facts = f"{kind(entry.key)} · default `{entry.default}`"
        use = f"```\n{example(entry.key)}\n```"
        meaning = _marked(entry.meaning, CHOICES.get(entry.key) or _shape(entry.key).get("enum", ()))
        yield f"#### `{entry.key}`\n\n*{facts}*\n\n{meaning}\n\n{use}"


def _spellings() -> Iterator[str]:
    yield "## Other spellings"
    yield "Other names of a key, as verl and AlphaApollo spell it, are read as ours. The start of the run says so:"
    yield _table("given", "read as", {given: f"`{ours}`" for given, ours in RENAMED.items()})
    yield "Two spellings of one key that differ are refused. These are accepted and change nothing:"
    yield _table("given", "why", {name: _marked(reason) for name, reason in WITHOUT_EFFECT.items()})
    yield "These are refused, because what they ask for is said by another key or does not exist here:"
    sections = {f"{name}.*": reason for name, reason in REFUSED_SECTIONS.items()}
    yield _table("given", "what to do", {name: _marked(reason) for name, reason in (REFUSED | sections).items()})
    yield "[Coming from verl and AlphaApollo](from_verl.md) says key by key what is the same."


def _table(first: str, second: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {first} | {second} |", "| --- | --- |", *(f"| `{a}` | {b} |" for a, b in rows.items())])


def _marked(comment: str, choices: Sequence[str] = ()) -> str:
    """A comment of the yaml as Markdown: links to other pages, everything that is code as code."""
    for choice in choices:
        word = rf"(?<!`)\b{re.escape(choice)}\b"
        explained = rf"{word}(?= \()"
        comment = re.sub(explained if re.search(explained, comment) else word, f"`{choice}`", comment)
    linked = LINK.sub(r"[\1](\1)", comment)
    return LITERAL.sub(lambda found: found[0] if found["kept"] else f"`{found[0]}`", linked)


def _coded(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _shape(key: str) -> dict[str, Any]:
    """What the schema says of a key, as JSON schema."""
    schema = SftConfig.model_json_schema()
    shape: dict[str, Any] = schema
    for part in key.split("."):
        shape = shape["properties"][part]
        if "$ref" in shape:
            shape = schema["$defs"][shape["$ref"].rpartition("/")[2]]
    return shape


def _spoken(shape: dict[str, Any]) -> str:
    if "description" in shape:
        return str(shape["description"]).replace("null", "`null`")
    if "anyOf" in shape:
        return ", or ".join(_spoken(each) for each in shape["anyOf"])
    if "enum" in shape or "const" in shape:
        return _coded(shape.get("enum", [shape.get("const")])).replace(", ", " or ")
    if shape["type"] == "array":
        count = f" of {shape['minItems']}" if shape.get("minItems", 0) == shape.get("maxItems") else ""
        return f"list{count}: {_spoken(shape['items'])}"
    return {"null": "`null`"}.get(shape["type"]) or f"{TYPES[shape['type']]}{_range(shape)}"


def _range(shape: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(shape[name])}" for name, sign in signs.items() if name in shape]
    return f" {' and '.join(bounds)}" if bounds else ""


def _number(value: float) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) and value > 0 else 0
    return f"2^{power}" if power > 20 and value == 2**power else f"{value:g}"


def main(arguments: list[str]) -> None:
    """Writes the made part of the page anew."""
    path = Path(arguments[0])
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
