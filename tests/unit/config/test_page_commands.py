"""The commands of the reference page, word for word as the shell hands them over."""

import shlex
from typing import Any

import pytest

from apollo_sft.config.compose import Composed, compose

GSM8K = """
data.train_files=$HOME/data/gsm8k/train.parquet
data.val_files=$HOME/data/gsm8k/test.parquet
data.prompt_key=extra_info
data.response_key=extra_info
data.prompt_dict_keys=['question']
+data.response_dict_keys=['answer']
data.micro_batch_size=4
optim.lr=1e-4
model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct
trainer.default_local_dir=/tmp/sft_output
trainer.project_name=gsm8k-sft
trainer.experiment_name=qwen-0.5b-sft
trainer.logger=['console']
trainer.total_epochs=4
ulysses_sequence_parallel_size=2
use_remove_padding=true
"""
LORA = """
model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct
model.lora_rank=32
model.lora_alpha=16
model.target_modules=all-linear
optim.lr=1e-4
data.train_files=$HOME/data/train.parquet
data.val_files=$HOME/data/test.parquet
trainer.total_epochs=3
"""
MULTITURN = """
data.train_files=$HOME/data/multiturn/train.parquet
data.val_files=$HOME/data/multiturn/test.parquet
data.multiturn.enable=true
data.multiturn.messages_key=messages
data.max_length=2048
model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct
trainer.total_epochs=4
"""


def as_typed(page: str) -> list[str]:
    """The shell takes the quotation marks away and leaves $HOME to us where it is quoted."""
    return shlex.split(page)


def in_quotes(page: str) -> list[str]:
    return page.split()


@pytest.fixture(params=[as_typed, in_quotes])
def shell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HOME", "/home/ann")
    return request.param


def test_gsm8k(shell: Any) -> None:
    composed: Composed = compose(shell(GSM8K))
    config = composed.config
    assert len(composed.overridden) == 16
    assert config.data.train_files == ("/home/ann/data/gsm8k/train.parquet",)
    assert (config.data.prompt_key, config.data.response_key) == ("extra_info", "extra_info")
    assert (config.data.prompt_dict_keys, config.data.response_dict_keys) == (("question",), ("answer",))
    assert config.data.micro_batch_size_per_gpu == 4
    assert config.trainer.logger == ("console",)
    assert config.ulysses_sequence_parallel_size == 2
    assert composed.notes == [
        "data.micro_batch_size is read as data.micro_batch_size_per_gpu",
        "use_remove_padding changes nothing: there never is padding",
    ]


def test_lora(shell: Any) -> None:
    composed: Composed = compose(shell(LORA))
    model = composed.config.model
    assert (model.lora_rank, model.lora_alpha, model.target_modules) == (32, 16, "all-linear")
    assert composed.notes == []


def test_multiturn(shell: Any) -> None:
    composed: Composed = compose(shell(MULTITURN))
    assert composed.config.data.multiturn.enable
    assert composed.config.data.max_length == 2048
    assert composed.notes == []
