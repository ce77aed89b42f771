"""What was read and what was filled is held against the files: a single changed value is found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_sft.errors import ModelError
from apollo_sft.model import attention, load
from apollo_sft.train.weights import CHUNK, check_as_built, check_read, checksum
from tests.support.exports import CASES
from tests.support.models import save_tiny_model, tiny_config

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 97, CHUNK + 3])
def test_sums_of_the_parts_add_up(dtype: torch.dtype, size: int) -> None:
    values = (torch.arange(size) % 113 - 7).to(dtype)
    whole = checksum(values, 0)
    for cut in {0, size // 3, size}:
        assert torch.equal(checksum(values[:cut], 0) + checksum(values[cut:], cut), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_or_moved_value_changes_the_sum(dtype: torch.dtype) -> None:
    values = torch.arange(1, 65).to(dtype)
    moved = values.clone()
    moved[[3, 40]] = values[[40, 3]]
    assert len({int(checksum(v, 0)) for v in (values, moved, values.flip(0), values.roll(1), 0 * values)}) == 5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_the_files_is_found(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """Also in experts that are fused in memory and apart in the files."""
    save_tiny_model(tmp_path, CASES[case]())
    attention.register(attention.sdpa_kernel)
    config = load.read_config(tmp_path, False)
    model = load.load_with_weights(tmp_path, config, dtype, False)
    check_read(model, tmp_path)
    weights = dict(model.named_parameters())
    name, parameter = max(weights.items(), key=lambda item: ("experts" in item[0], item[1].numel()))
    with torch.no_grad():
        parameter.view(-1)[-1] += 1
    with pytest.raises(ModelError, match="was not loaded as it is in the files"):
        check_read(model, tmp_path)
    assert ("experts" in name) == (case in ("qwen3-moe", "mixtral"))


def built(**changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(tiny_config("Qwen2", **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tie_word_embeddings": True}, "shared weights differ: ('model.embed_tokens.weight', 'lm_head.weight')"),
        ({"num_hidden_layers": 3}, "parameters and buffers differ: model.layers.2"),
        ({"vocab_size": 98}, "parameters and buffers differ: other shapes"),
    ],
)
def test_a_model_that_is_not_what_other_ranks_build_is_refused(changes: dict[str, Any], words: str) -> None:
    check_as_built(built(), built())
    with pytest.raises(ModelError) as caught:
        check_as_built(built(tie_word_embeddings=False), built(**({"tie_word_embeddings": False} | changes)))
    assert words in str(caught.value)
