"""A model that always says the same: what it writes next depends on the last token alone, by construction."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.data import tiny_tokenizer
from tests.support.models import tiny_config

WIDTH = 384


def chain_model(tokenizer: Any, last_of_prompt: str, reply: str, family: str = "Qwen2", **changes: Any) -> Any:
    """After a prompt that ends in `last_of_prompt` it says `reply`, which may end in the text of a stop token.

    Every token stands for a direction of its own, layers add nothing, and the head leads from one token to the next.
    """
    width = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "head_dim": WIDTH // 4, "tie_word_embeddings": False}
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **(width | changes)))
    ids = tokenizer.encode(last_of_prompt, add_special_tokens=False)[-1:]
    ids += tokenizer.encode(reply, add_special_tokens=False)
    assert len(set(ids)) == len(ids), "one token leads to one other"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(len(tokenizer), WIDTH))
        head = model.get_output_embeddings().weight
        head.zero_()
        for here, there in pairwise(ids):
            head[there, here] = 1.0
    return model


def write_chain_model(folder: Path, family: str = "Qwen2", **changes: Any) -> Path:
    """A model folder that answers every question of chatml with `\\boxed{7}`, and stops."""
    tokenizer = tiny_tokenizer(eos_token="<|im_end|>")
    changes = {"eos_token_id": tokenizer.eos_token_id} | changes
    model = chain_model(tokenizer, "<|im_start|>assistant\n", "\\boxed{7}<|im_end|>", family, **changes)
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
