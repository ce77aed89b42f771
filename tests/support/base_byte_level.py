"""Tiny bases of families with byte-level BPE: GPT-2, Pythia, Llama 3, Qwen, DeepSeek, SmolLM, Granite, OLMo 2."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.support import base_templates as templates
from tests.support.base_sentencepiece import LLAMA_CONFIG, LONG, SIZES
from tests.support.base_tokenizers import (
    AFTER_SPLIT,
    BYTE_LEVEL,
    LLAMA3_SPLIT,
    NUM_BYTE_LEVEL,
    O200K_SPLIT,
    QWEN_SPLIT,
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
from tests.support.base_weights import (
    Shapes,
    decoder_shapes,
    draw,
    expert_shapes,
    gpt2_masks,
    gpt2_shapes,
    head_widths,
    in_layers,
    neox_buffers,
    neox_shapes,
    write_shards,
    write_weights,
)

N = NUM_BYTE_LEVEL
"""The number of the first token behind the bytes and merges, where no special ones come first."""

END = "<|endoftext|>"
DIGITS: Json = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
NAMED = ("bos_token", "eos_token", "unk_token")


def gpt2(folder: Path) -> None:
    """Write gpt2's form: no tokenizer class, no dtype, no template; names without prefix."""
    vocabulary = byte_level_vocabulary(last=[END])
    config: Json = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": N,
        "embd_pdrop": 0.1,
        "eos_token_id": N,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 256,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 256,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": len(vocabulary),
    }
    write_json(folder / "config.json", config)
    generation: Json = {"_from_model_config": True, "bos_token_id": N, "eos_token_id": N}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.26.0.dev0"})
    whole = byte_level_json(vocabulary, [token(END, N, normalized=True)], BYTE_LEVEL, merges_as_text=True)
    write_json(folder / "tokenizer.json", whole)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 256})
    write_vocabulary(folder, vocabulary)
    write_weights(folder, draw(gpt2_shapes(config), seed=11) | gpt2_masks(config), torch.float32)


def pythia(folder: Path) -> None:
    """Write Pythia's form: fp16 with masks in the file, NFC, runs of spaces as added tokens, a padded vocabulary."""
    vocabulary = byte_level_vocabulary(first=[END, "<|padding|>"])
    runs = [token(" " * width, N + 2 + place, False, normalized=True) for place, width in enumerate((4, 3, 2))]
    config: Json = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 256,
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "rotary_emb_base": 20000,
        "rotary_pct": 0.5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": N + 22,
    }
    write_json(folder / "config.json", config)
    added = [*tokens([END, "<|padding|>"], 0), *runs]
    parts = {"normalizer": {"type": "NFC"}, "post_processor": BYTE_LEVEL, "merges_as_text": True}
    write_json(folder / "tokenizer.json", byte_level_json(vocabulary, added, BYTE_LEVEL, **parts))
    own = dict.fromkeys(NAMED, END) | {"add_prefix_space": False, "name_or_path": "EleutherAI/gpt-neox-20b"}
    own |= {"special_tokens_map_file": "/admin/home/special_tokens_map.json", "tokenizer_class": "GPTNeoXTokenizer"}
    write_json(folder / "tokenizer_config.json", own)
    write_json(folder / "special_tokens_map.json", dict.fromkeys(NAMED, END))
    write_weights(folder, draw(neox_shapes(config), seed=12) | neox_buffers(config), torch.float16)


LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def _llama3_model(folder: Path, vocabulary_size: int, seed: int) -> None:
    """Write config, generation config and weights of Llama 3.2, with its scaled rotary frequencies."""
    stops = [N + 1, N + 5, N + 6]
    scaling: Json = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
    scaling |= {"original_max_position_embeddings": 64, "rope_type": "llama3"}
    config = LLAMA_CONFIG | {"attention_dropout": 0.0, "bos_token_id": N, "eos_token_id": stops, "head_dim": 8}
    config |= {"mlp_bias": False, "rope_scaling": scaling, "rope_theta": 500000.0, "tie_word_embeddings": True}
    config |= {"transformers_version": "4.45.0.dev0", "vocab_size": vocabulary_size}
    write_json(folder / "config.json", config)
    generation: Json = {"bos_token_id": N, "do_sample": True, "eos_token_id": stops, "temperature": 0.6, "top_p": 0.9}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.45.0.dev0"})
    write_weights(folder, draw(decoder_shapes(config), seed), torch.bfloat16)


def _llama3_tokenizer(folder: Path, specials: Sequence[str]) -> Json:
    """Write tokenizer.json; give back what tokenizer_config.json holds but for the template and the end token."""
    added = tokens(specials, N)
    processors = [AFTER_SPLIT, beginning(specials[0], N)]
    parts = {"post_processor": {"type": "Sequence", "processors": processors}, "ignore_merges": True}
    write_json(
        folder / "tokenizer.json", byte_level_json(byte_level_vocabulary(), added, splits(LLAMA3_SPLIT), **parts)
    )
    return {
        "added_tokens_decoder": decoder_entries(added),
        "bos_token": specials[0],
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def llama3(folder: Path) -> None:
    """Write Llama-3.2-1B-Instruct's form."""
    _llama3_model(folder, N + len(LLAMA3_SPECIALS), seed=13)
    own = _llama3_tokenizer(folder, LLAMA3_SPECIALS) | {"chat_template": templates.LLAMA3, "eos_token": "<|eot_id|>"}
    write_json(folder / "tokenizer_config.json", own)
    marks = {"bos_token": saved("<|begin_of_text|>"), "eos_token": saved("<|eot_id|>")}
    write_json(folder / "special_tokens_map.json", marks)


def hermes(folder: Path) -> None:
    """Write Hermes-2-Pro-Llama-3's form: a list of named templates, and ChatML tokens in place of reserved ones."""
    specials = [*LLAMA3_SPECIALS[:3], "<|im_start|>", "<|im_end|>", *LLAMA3_SPECIALS[5:]]
    _llama3_model(folder, N + len(specials) + 5, seed=14)
    named = [("default", templates.CHATML_WITH_SYSTEM), ("tool_use", templates.CHATML)]
    listed = [{"name": name, "template": text} for name, text in named]
    own = _llama3_tokenizer(folder, specials) | {"chat_template": listed, "eos_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", own | {"pad_token": "<|end_of_text|>"})
    marks = {"bos_token": saved("<|begin_of_text|>"), "eos_token": saved("<|im_end|>")}
    write_json(folder / "special_tokens_map.json", marks | {"pad_token": saved("<|end_of_text|>")})


def o200k(folder: Path) -> None:
    """Write the form of a Llama with o200k's split, and its template in a file of its own."""
    names = ["<|startoftext|>", END, "<|return|>", "<|constrain|>", "<|start|>", "<|end|>", "<|message|>"]
    added = tokens(names, N)
    config = LLAMA_CONFIG | {"bos_token_id": N, "eos_token_id": N + 2, "pad_token_id": N + 1, "rope_theta": 150000.0}
    config |= {"torch_dtype": "float32", "transformers_version": "4.51.3", "vocab_size": N + 22, "head_dim": 16}
    write_json(folder / "config.json", config)
    generation: Json = {"bos_token_id": N, "do_sample": True, "eos_token_id": [N + 2, N + 1], "pad_token_id": N + 1}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.51.3"})
    write_json(folder / "tokenizer.json", byte_level_json(byte_level_vocabulary(), added, splits(O200K_SPLIT)))
    own: Json = {
        "added_tokens_decoder": decoder_entries(added),
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": LONG,
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", own)
    (folder / "chat_template.jinja").write_text(templates.HARMONY, encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": END}
    write_json(folder / "special_tokens_map.json", marks)
    write_weights(folder, draw(decoder_shapes(config), seed=15), torch.float32)


def smollm3(folder: Path) -> None:
    """Write SmolLM3's form: layers without rotary embedding, a template in a file of its own."""
    specials = [*LLAMA3_SPECIALS[:2], "<think>", "</think>", "<|im_start|>", "<|im_end|>"]
    added = [one | {"special": one["content"][1] == "|"} for one in tokens(specials, N)]
    config = LLAMA_CONFIG | {"architectures": ["SmolLM3ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": N}
    config |= {"eos_token_id": N + 5, "layer_types": ["full_attention"] * 2, "max_window_layers": 2, "mlp_bias": False}
    config |= {"model_type": "smollm3", "no_rope_layer_interval": 2, "no_rope_layers": [1, 0], "pad_token_id": N + 5}
    config |= {"pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "sliding_window": None}
    config |= {"tie_word_embeddings": True, "transformers_version": "4.53.0", "use_sliding_window": False}
    config |= {"vocab_size": N + len(specials)}
    write_json(folder / "config.json", config)
    generation: Json = {"bos_token_id": N, "do_sample": True, "eos_token_id": N + 5, "pad_token_id": N + 5}
    generation |= {"temperature": 0.6, "top_p": 0.95, "transformers_version": "4.53.0"}
    write_json(folder / "generation_config.json", generation)
    own = _llama3_tokenizer(folder, specials) | {"added_tokens_decoder": decoder_entries(added), "fast": False}
    whole = byte_level_json(byte_level_vocabulary(), added, splits(LLAMA3_SPLIT), ignore_merges=True)
    write_json(folder / "tokenizer.json", whole)
    own |= {"bos_token": None, "eos_token": "<|im_end|>", "extra_special_tokens": {}, "pad_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", own)
    (folder / "chat_template.jinja").write_text(templates.CHATML_THINKING, encoding="utf-8")
    write_json(folder / "special_tokens_map.json", {name: saved("<|im_end|>") for name in ("eos_token", "pad_token")})
    write_weights(folder, draw(decoder_shapes(config), seed=16), torch.bfloat16)


QWEN_SPECIALS = (END, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|vision_pad|>")
QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
QWEN_CONFIG: Json = SIZES | {
    "attention_dropout": 0.0,
    "bos_token_id": N,
    "eos_token_id": N + 2,
    "hidden_act": "silu",
    "max_window_layers": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": N + 38,
}


def _qwen_tokenizer(folder: Path, plain: Sequence[str], template: str) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json; `plain` are added but not special."""
    added = [*tokens(QWEN_SPECIALS, N), *tokens(plain, N + len(QWEN_SPECIALS), special=False)]
    vocabulary = byte_level_vocabulary()
    part = BYTE_LEVEL | {"trim_offsets": False, "use_regex": False}
    processors: Json = {"normalizer": {"type": "NFC"}, "post_processor": part, "decoder": part}
    write_json(folder / "tokenizer.json", byte_level_json(vocabulary, added, splits(QWEN_SPLIT), **processors))
    write_vocabulary(folder, vocabulary)
    own: Json = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder_entries(added),
        "additional_special_tokens": list(QWEN_SPECIALS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", own)


def query_biases(config: Json) -> Shapes:
    """Name the biases of queries, keys and values, which Qwen2 has."""
    queries, keys = head_widths(config)
    biases: Shapes = {f"self_attn.{name}_proj.bias": (keys if name in "kv" else queries,) for name in "qkv"}
    return in_layers(config, biases)


def qwen2_5(folder: Path) -> None:
    """Write Qwen2.5-0.5B-Instruct's form."""
    config = QWEN_CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 512}
    write_json(folder / "config.json", config | {"transformers_version": "4.43.1"})
    generation: Json = {"bos_token_id": N, "pad_token_id": N, "do_sample": True, "eos_token_id": [N + 2, N]}
    generation |= {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.37.0"})
    _qwen_tokenizer(folder, QWEN_PLAIN, templates.CHATML_WITH_SYSTEM)
    write_weights(folder, draw(decoder_shapes(config) | query_biases(config), seed=17), torch.bfloat16)


QWEN3_GENERATION: Json = {
    "bos_token_id": N,
    "do_sample": True,
    "eos_token_id": [N + 2, N],
    "pad_token_id": N,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def _qwen3(folder: Path, config: Json) -> Shapes:
    """Write what Qwen3 and its mixture of experts share; give back the norms of their heads."""
    write_json(folder / "config.json", config | {"transformers_version": "4.51.0"})
    write_json(folder / "generation_config.json", QWEN3_GENERATION)
    _qwen_tokenizer(folder, (*QWEN_PLAIN, "<think>", "</think>"), templates.CHATML_THINKING)
    return in_layers(config, {f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"})


def qwen3(folder: Path) -> None:
    """Write Qwen3-0.6B's form: sampling defaults, tokens that are added but not special."""
    config = QWEN_CONFIG | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16}
    config |= {"model_type": "qwen3", "rope_scaling": None, "sliding_window": None}
    norms = _qwen3(folder, config)
    write_weights(folder, draw(decoder_shapes(config) | norms, seed=18), torch.bfloat16)


def qwen3_moe(folder: Path) -> None:
    """Write Qwen3-30B-A3B's form: each expert by itself, in shards."""
    config = QWEN_CONFIG | {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 8}
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "model_type": "qwen3_moe", "norm_topk_prob": True}
    config |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False}
    config |= {"rope_scaling": None, "router_aux_loss_coef": 0.001, "sliding_window": None}
    config["tie_word_embeddings"] = False
    norms = _qwen3(folder, config)
    write_shards(folder, draw(expert_shapes(config) | norms, seed=19), torch.bfloat16, number=3)
