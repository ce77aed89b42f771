"""The workload of the speed benches: a Qwen2-style model of 15.7M parameters and conversations of 32 to 400 tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apollo_sft.data.store.store_files import StoreSummary, StoreWriter, count_targets
from apollo_sft.prepare.demo_model import train_tokenizer
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample

VOCABULARY = 16_384
SHORTEST, LONGEST = 32, 400
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Nothing stands after the token that ends a turn: all trainers then have the same targets."""
TEMPLATE_TOKENS = 6
PROMPT_SHARE = 0.3
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]


def write_model(folder: Path, hidden: int = 384, layers: int = 6, vocabulary: int = VOCABULARY) -> None:
    """Random weights, tied embeddings; the file is float32, so that all who read it start from the same."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def write_conversations(folder: Path, num_rows: int, name: str = "rows.parquet") -> Path:
    """A tokenizer in `folder`, and a parquet file of `prompt` and `response` in words that are a token each, mostly."""
    rng = np.random.default_rng(0)
    words = np.array(sorted({"".join(rng.choice(SYLLABLES, 3)) for _ in range(4000)}))
    tokenizer = train_tokenizer([" " + word for word in words], VOCABULARY)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    prompts, responses = [], []
    for length in rng.integers(SHORTEST, LONGEST + 1, num_rows) - TEMPLATE_TOKENS:
        text = rng.choice(words, length)
        cut = int(length * PROMPT_SHARE)
        prompts.append(" ".join(text[:cut]))
        responses.append(" ".join(text[cut:]))
    path = folder / name
    pq.write_table(pa.table({"prompt": prompts, "response": responses}), path)
    return path


def write_store(folder: Path, num_samples: int, lengths: tuple[int, int], vocabulary: int = VOCABULARY) -> None:
    """A store of random tokens, as many targets as in the conversations. `lengths`: the shortest and the longest."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    writer = StoreWriter(folder, ["rows"])
    summary = StoreSummary(["rows"], num_rows=num_samples, num_samples=num_samples)
    for row, length in enumerate(rng.integers(lengths[0], lengths[1] + 1, num_samples)):
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        labels = np.append(ids[1:], np.int32(IGNORE_INDEX))
        labels[: int(length * PROMPT_SHARE)] = IGNORE_INDEX
        sample = Sample(ids, labels, RowRef("rows", row), (1,))
        writer.add(sample)
        summary.num_tokens += len(ids)
        summary.num_targets += count_targets(sample)
    writer.finish("bench", summary)
