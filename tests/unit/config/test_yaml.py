"""sft_trainer.yaml is what users read: made from the schema, commented, and with the defaults of the page."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from apollo_sft.config import compose as composing
from apollo_sft.config.compose import YAML_PATH, compose, defaults
from apollo_sft.config.keys import NOTHING, Key, Section, section_of
from apollo_sft.config.schema import KEYS, SftConfig
from apollo_sft.config.values import with_values
from apollo_sft.config.yaml_text import entries, yaml_text
from apollo_sft.errors import ConfigError

PAGE = """
data: {train_batch_size: 256, micro_batch_size_per_gpu: 4, train_files: ~/data/gsm8k/train.parquet,
  val_files: ~/data/gsm8k/test.parquet, prompt_key: question, response_key: answer, prompt_dict_keys: [question],
  response_dict_keys: [answer], multiturn: {enable: false, messages_key: messages}, max_length: 1024, truncation: error,
  balance_dp_token: false, chat_template: null, custom_cls: {path: null, name: null}}
model: {partial_pretrain: ~/models/gemma-1.1-7b-it, strategy: fsdp2, fsdp_config: {wrap_policy: {min_num_params: 0},
  cpu_offload: false, offload_params: false}, external_lib: null, enable_gradient_checkpointing: false,
  trust_remote_code: false, lora_rank: 0, lora_alpha: 16, target_modules: all-linear, use_liger: false}
optim: {lr: 1e-5, betas: [0.9, 0.95], weight_decay: 0.01, warmup_steps_ratio: 0.1, clip_grad: 1.0, lr_scheduler: cosine}
trainer: {default_local_dir: /tmp/sft_model, project_name: gsm8k-sft, experiment_name: test, total_epochs: 4,
  total_training_steps: null, logger: [console], seed: 1}
ulysses_sequence_parallel_size: 1
use_remove_padding: false
"""
"""The defaults of the reference page, all of them."""


@cache
def composed_defaults() -> SftConfig:
    return compose([]).config


def test_it_is_what_the_schema_gives() -> None:
    assert YAML_PATH.read_text(encoding="utf-8") == yaml_text(), "run make docs-reference"


@pytest.mark.parametrize("key", KEYS)
def test_a_default_is_written_as_the_schema_has_it(key: str) -> None:
    """A list of one path may be written as a path, and an empty list as null: read again, they must be the same."""
    *path, name = key.split(".")
    section: Any = SftConfig
    for part in path:
        section = section_of(section.model_fields[part])
    default = section.model_fields[name].get_default(call_default_factory=True)
    config = composed_defaults()
    assert with_values(config, {key: default}) == config


def test_another_set_of_keys_than_the_schema_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "sft_trainer.yaml"
    text = yaml_text()
    stale.write_text(text.replace("  seed: 1\n", "  note: 1\n"), encoding="utf-8")
    monkeypatch.setattr(composing, "YAML_PATH", stale)
    with pytest.raises(ConfigError, match=r"trainer\.note, trainer\.seed\n.*make docs-reference"):
        defaults.__wrapped__()


def test_a_key_or_a_section_without_a_docstring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Section):
        note: Annotated[bool, Key(changes=NOTHING)] = False

    class Outer(Section):
        bare: Bare

    for schema, name in ((Bare, "note"), (Outer, "bare")):
        monkeypatch.setattr("apollo_sft.config.yaml_text.SftConfig", schema)
        with pytest.raises(ConfigError, match=f"{name} has no docstring"):
            list(entries())


def test_every_key_has_a_comment_of_its_own() -> None:
    lines = [line.strip() for line in YAML_PATH.read_text(encoding="utf-8").splitlines()]
    bare = [line for above, line in pairwise(lines) if re.match(r"\w+: ", line) and not above.startswith("#")]
    assert bare == []


@pytest.mark.parametrize("section", ["data", "model", "optim", "trainer"])
def test_the_defaults_of_the_page(section: str) -> None:
    ours, page = OmegaConf.load(YAML_PATH), OmegaConf.create(PAGE)
    merged = OmegaConf.merge(ours, page)
    assert OmegaConf.to_container(merged[section]) == OmegaConf.to_container(ours[section])
    assert ours.ulysses_sequence_parallel_size == page.ulysses_sequence_parallel_size
    assert ours.use_remove_padding == page.use_remove_padding
