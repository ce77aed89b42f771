"""A tokenizer trained here, chat templates of different habits, data configs and parquet files."""

from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import DataConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOSING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
"""Like Phi-3's: a mark after the last turn that no other turn has."""

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Like Qwen3's: the think block of earlier turns is dropped."""

STARTING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Like GLM's: a reply ends where the next message starts."""

UNSTOPPED = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
"""No stop token at all."""

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = [
    "the answer is four",
    "what is two plus two",
    "assistant\n",
    "user\n\n\n",
    "one two three",
    "\n\n",
    "  ",
    "\n ",
]


@cache
def _backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    return tokenizer


def tiny_tokenizer(chat_template: str | None = CHATML, **changes: Any) -> Any:
    """Byte-level BPE of 360 tokens; eos `<|endoftext|>`; `<|im_end|>` and others are special."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend().to_str()),
        **(
            {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "additional_special_tokens": SPECIALS}
            | changes
        ),
    )
    fast.chat_template = chat_template
    return fast


@cache
def _defaults() -> DataConfig:
    return compose(["data.train_files=train.parquet", "data.val_files=null"]).config.data


def data_config(multiturn: bool = False, **changes: Any) -> DataConfig:
    """The data section with its defaults, but for `changes`."""
    data = _defaults()
    if multiturn:
        changes["multiturn"] = data.multiturn.model_copy(update={"enable": True})
    return data.model_copy(update=changes)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def chat(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
