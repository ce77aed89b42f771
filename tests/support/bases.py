"""Complete tiny base models in the forms in which real families lie on the hub. Nothing is downloaded.

`FAMILIES` writes the folder of each: config, generation config, tokenizer and weights as those of transformers 4 are,
never as transformers 5 would write them. The weights are small and random.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.support import base_byte_level, base_sentencepiece
from tests.support import base_templates as templates
from tests.support.base_byte_level import DIGITS, END, QWEN_CONFIG, N, query_biases
from tests.support.base_sentencepiece import LLAMA_CONFIG, LONG
from tests.support.base_templates import CONVERSATIONS, PLAIN, TEXTS
from tests.support.base_tokenizers import (
    AFTER_SPLIT,
    DEEPSEEK_SPLITS,
    LLAMA3_SPLIT,
    Json,
    beginning,
    byte_level_json,
    byte_level_vocabulary,
    decoder_entries,
    saved,
    splits,
    token,
    tokens,
    write_json,
    write_vocabulary,
)
from tests.support.base_weights import Shapes, decoder_shapes, draw, head_widths, in_layers, write_weights

__all__ = ["CONVERSATIONS", "FAMILIES", "NEEDS_SENTENCEPIECE", "PLAIN", "TEXTS", "WITHOUT_TEMPLATE"]


DEEPSEEK_SPECIALS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
DEEPSEEK_MORE = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


def _deepseek_tokenizer(folder: Path) -> None:
    """Write tokenizer.json alone, whose class is said to be Llama's; end tokens are dicts with a type."""
    vocabulary = byte_level_vocabulary(first=DEEPSEEK_SPECIALS)
    front = [one | {"normalized": True} for one in tokens(DEEPSEEK_SPECIALS, 0)]
    added = [*front, *tokens(DEEPSEEK_MORE, N + len(DEEPSEEK_SPECIALS), special=False)]
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": []},
        "post_processor": beginning(DEEPSEEK_SPECIALS[0], 0),
    }
    write_json(folder / "tokenizer.json", byte_level_json(vocabulary, added, splits(*DEEPSEEK_SPLITS), **parts))
    begin, end, _ = (saved(text, typed=True, normalized=True) for text in DEEPSEEK_SPECIALS)
    own: Json = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": begin,
        "chat_template": templates.DEEPSEEK,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": end,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", own)


def deepseek(folder: Path) -> None:
    """Write deepseek-llm's form: a Llama model."""
    config = LLAMA_CONFIG | {"bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-06, "vocab_size": N + 22}
    write_json(folder / "config.json", config | {"transformers_version": "4.33.1"})
    generation: Json = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True}
    generation |= {"temperature": 0.7, "top_p": 0.95, "transformers_version": "4.33.1"}
    write_json(folder / "generation_config.json", generation)
    _deepseek_tokenizer(folder)
    write_weights(folder, draw(decoder_shapes(config), seed=20), torch.bfloat16)


def deepseek_r1_qwen(folder: Path) -> None:
    """Write DeepSeek-R1-Distill-Qwen's form: a Qwen2 model under the same tokenizer."""
    config = QWEN_CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 512}
    config |= {"bos_token_id": 1, "eos_token_id": 1, "rope_theta": 10000, "use_mrope": False}
    config |= {"tie_word_embeddings": False, "transformers_version": "4.44.0"}
    write_json(folder / "config.json", config)
    generation: Json = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True}
    generation |= {"temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3"}
    write_json(folder / "generation_config.json", generation)
    _deepseek_tokenizer(folder)
    write_weights(folder, draw(decoder_shapes(config) | query_biases(config), seed=21), torch.bfloat16)


def _gpt2_class(folder: Path, own: Json) -> None:
    """Write tokenizer_config.json of the class GPT2Tokenizer."""
    plain = {"clean_up_tokenization_spaces": False, "tokenizer_class": "GPT2Tokenizer"}
    write_json(folder / "tokenizer_config.json", {"add_prefix_space": False} | own | plain)


def smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct's form: GPT-2's tokenizer class over single digits, a Llama model."""
    specials = (END, "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>")
    vocabulary, added = byte_level_vocabulary(first=specials), tokens(specials, 0)
    config = LLAMA_CONFIG | {"bos_token_id": 1, "eos_token_id": 2, "is_llama_config": True, "pad_token_id": 2}
    config |= {"rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config |= {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "vocab_size": len(vocabulary)}
    write_json(folder / "config.json", config | {"transformers_version": "4.42.3"})
    generation: Json = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.42.3"})
    whole = byte_level_json(vocabulary, added, DIGITS, post_processor=None, merges_as_text=True)
    write_json(folder / "tokenizer.json", whole)
    write_vocabulary(folder, vocabulary)
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": END}
    turns = ["<|im_start|>", "<|im_end|>"]
    own: Json = {
        "added_tokens_decoder": decoder_entries(added),
        "additional_special_tokens": turns,
        "vocab_size": 49152,
    }
    _gpt2_class(folder, own | marks | {"chat_template": templates.CHATML_WITH_SYSTEM, "model_max_length": 8192})
    mapped: Json = {"additional_special_tokens": turns} | {name: saved(text) for name, text in marks.items()}
    write_json(folder / "special_tokens_map.json", mapped)
    write_weights(folder, draw(decoder_shapes(config), seed=31), torch.bfloat16)


def granite(folder: Path) -> None:
    """Write granite-3-instruct's form: multipliers in the config, tokens beside those of the vocabulary."""
    specials = ("<|end_of_text|>", "<fim_prefix>", "<fim_middle>")
    vocabulary = byte_level_vocabulary(first=specials)
    roles = ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
    more = tokens(roles, len(vocabulary))
    added = [*tokens(specials, 0), *more]
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "pretraining_tp"}
    config |= {"architectures": ["GraniteForCausalLM"], "attention_dropout": 0.1, "attention_multiplier": 0.2}
    config |= {"bos_token_id": 0, "embedding_multiplier": 3.0, "eos_token_id": 0, "logits_scaling": 2.0}
    config |= {"mlp_bias": False, "model_type": "granite", "pad_token_id": 0, "residual_multiplier": 0.5}
    config |= {"rope_theta": 10000000.0, "tie_word_embeddings": True, "vocab_size": len(vocabulary) + len(more)}
    write_json(folder / "config.json", config | {"transformers_version": "4.46.0.dev0"})
    generation: Json = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.46.0.dev0"})
    write_json(folder / "tokenizer.json", byte_level_json(vocabulary, added, DIGITS, merges_as_text=True))
    write_vocabulary(folder, vocabulary)
    write_json(folder / "added_tokens.json", {one["content"]: one["id"] for one in more})
    marks = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|end_of_text|>")
    own: Json = {
        "added_tokens_decoder": decoder_entries(added),
        "additional_special_tokens": list(roles),
        "errors": "replace",
    }
    own |= {"chat_template": templates.GRANITE, "model_max_length": 9223372036854775807, "padding_side": "left"}
    _gpt2_class(folder, own | marks | {"vocab_size": 49152})
    mapped = {name: saved(text) for name, text in marks.items()}
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": list(roles)} | mapped)
    write_weights(folder, draw(decoder_shapes(config), seed=32), torch.bfloat16)


def olmo2(folder: Path) -> None:
    """Write OLMo-2-Instruct's form: GPT-2's class over the split of cl100k, norms behind the blocks, fp32."""
    vocabulary = byte_level_vocabulary()
    special = [END, "<|fim_prefix|>", "<|endofprompt|>", "<|pad|>"]
    added = [token("<|extra_id_0|>", N, special=False), *tokens(special, N + 1)]
    config = {key: value for key, value in LLAMA_CONFIG.items() if key not in ("pretraining_tp", "bos_token_id")}
    config |= {"architectures": ["Olmo2ForCausalLM"], "attention_dropout": 0.0, "eos_token_id": N + 1}
    config |= {"model_type": "olmo2", "pad_token_id": N + 4, "rms_norm_eps": 1e-06, "rope_theta": 500000}
    config |= {"torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": N + 22}
    write_json(folder / "config.json", config)
    generation: Json = {"_from_model_config": True, "eos_token_id": N + 1, "pad_token_id": N + 4}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.47.0.dev0"})
    cut = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Removed", "invert": True}
    before = {"type": "Sequence", "pretokenizers": [cut, AFTER_SPLIT]}
    write_json(folder / "tokenizer.json", byte_level_json(vocabulary, added, before, post_processor=None))
    write_vocabulary(folder, vocabulary)
    marks = {"bos_token": END, "eos_token": END, "pad_token": "<|pad|>", "unk_token": END}
    own: Json = {
        "added_tokens_decoder": decoder_entries(added),
        "chat_template": templates.OLMO,
        "model_max_length": LONG,
    }
    _gpt2_class(folder, own | marks)
    write_json(folder / "special_tokens_map.json", {name: saved(text) for name, text in marks.items()})
    queries, keys = head_widths(config)
    more: Shapes = {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    shapes = decoder_shapes(config, ("post_attention", "post_feedforward")) | in_layers(config, more)
    write_weights(folder, draw(shapes, seed=33), torch.float32)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "gpt2": base_byte_level.gpt2,
    "pythia": base_byte_level.pythia,
    "tinyllama": base_sentencepiece.tinyllama,
    "vicuna": base_sentencepiece.vicuna,
    "mistral": base_sentencepiece.mistral,
    "phi3": base_sentencepiece.phi3,
    "gemma2": base_sentencepiece.gemma2,
    "gemma3": base_sentencepiece.gemma3,
    "llama3": base_byte_level.llama3,
    "hermes": base_byte_level.hermes,
    "o200k": base_byte_level.o200k,
    "qwen2.5": base_byte_level.qwen2_5,
    "qwen3": base_byte_level.qwen3,
    "qwen3-moe": base_byte_level.qwen3_moe,
    "deepseek": deepseek,
    "deepseek-r1-qwen": deepseek_r1_qwen,
    "smollm2": smollm2,
    "smollm3": base_byte_level.smollm3,
    "granite": granite,
    "olmo2": olmo2,
}
"""Each writes into an empty folder that is there."""

WITHOUT_TEMPLATE = ("gpt2", "pythia", "vicuna")
"""Pretrained forms: a training has to say which template it uses."""

NEEDS_SENTENCEPIECE = ("vicuna",)
"""What no reader opens without the package of that name: there is no tokenizer.json."""
