"""sft_trainer.yaml is what users read: complete, commented, and the only place of a default."""

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from apollo_sft.config.compose import YAML_PATH, known_keys
from apollo_sft.config.schema import SftConfig

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


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
            assert info.is_required(), f"{prefix}{name} has a second default in the schema"


def test_yaml_and_schema_hold_the_same_keys() -> None:
    assert sorted(leaves(SftConfig)) == sorted(known_keys())


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
