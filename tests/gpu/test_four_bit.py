"""A base in 4 bits on a CUDA device: its codes, a training over it, the model that is handed over."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from apollo_sft.model import four_bit
from apollo_sft.model.four_bit import FourBitLinear
from tests.ranks.test_four_bit import write_dense
from tests.support.runs import series, train_here, write_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra qlora"),
]
KEYS = ("trainer.device=cuda", "trainer.total_training_steps=6", "trainer.save_freq=1000", "model.lora_rank=8")
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_devices_make_the_same_of_a_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(1024, 512, bias=False, dtype=dtype)
    weight = plain.weight.detach()
    here, there = (FourBitLinear(plain, *four_bit._quantised(weight, device)) for device in (CPU, torch.device("cuda")))
    assert (here.weight != there.weight).float().mean() < 1e-4, "only in the middle between two codes"
    assert torch.equal(here.absmax, there.absmax)
    on_cpu = there.dense()
    torch.testing.assert_close(there.to("cuda").dense().cpu(), on_cpu)


@pytest.mark.parametrize("more", [(), ("model.fsdp_config.cpu_offload=true",)], ids=["plain", "offload"])
def test_a_training_is_that_over_what_the_bits_stand_for(tmp_path: Path, more: tuple[str, ...]) -> None:
    """The run itself compares the merged model with base and adapter before it is visible."""
    inputs = write_inputs(tmp_path, hidden_size=64, intermediate_size=128)
    write_dense(inputs / "model", tmp_path / "dense")
    for file in (inputs / "model").glob("*token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    template = inputs / "model" / "chat_template.jinja"
    (tmp_path / "dense" / template.name).write_bytes(template.read_bytes())
    four = train_here(inputs, tmp_path / "four", *KEYS, "model.load_in_4bit=true", *more)
    dense = train_here(inputs, tmp_path / "out", *KEYS, f"model.partial_pretrain={tmp_path / 'dense'}", *more)
    assert series(four, "train/loss") == pytest.approx(series(dense, "train/loss"), rel=3e-2)
    assert (tmp_path / "four" / "config.json").is_file()
