"""Tiny bases of families whose tokenizer is a SentencePiece model: TinyLlama, Vicuna, Mistral, Phi-3, Gemma 2 and 3.

Numbers of their configs are not those that a class has by default: a reader that drops a key shows it.
"""

from pathlib import Path

import torch

from tests.support import base_templates as templates
from tests.support.base_tokenizers import (
    CONTROL,
    GEMMA_DECODER,
    LLAMA_DECODER,
    LLAMA_NORMALIZER,
    METASPACE,
    SPACES,
    UNKNOWN,
    USER_DEFINED,
    Json,
    Pieces,
    beginning,
    decoder_entries,
    pieces,
    saved,
    sentencepiece_json,
    token,
    tokens,
    write_json,
    write_sentencepiece,
)
from tests.support.base_weights import decoder_shapes, draw, fused_shapes, head_widths, in_layers, write_weights

LONG = 1000000000000000019884624838656
LLAMA_SPECIALS = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))
LLAMA_ADDED = tokens(["<unk>", "<s>", "</s>"], 0)
SIZES: Json = {
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "use_cache": True,
}
LLAMA_CONFIG: Json = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_TOKENIZER: Json = {
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "use_default_system_prompt": False,
}


def _only_text(number: int) -> Json:
    """Build the post-processor that adds nothing, as Phi-3's file has it."""
    begins = beginning("<s>", number)
    return begins | {"single": begins["single"][1:], "pair": [begins["pair"][1], begins["pair"][3]]}


def tinyllama(folder: Path) -> None:
    """Write TinyLlama-1.1B-Chat's form: tokenizer.model and tokenizer.json; special tokens as strings and as dicts."""
    held = pieces(LLAMA_SPECIALS)
    config = LLAMA_CONFIG | {"vocab_size": len(held.all), "transformers_version": "4.35.0"}
    write_json(folder / "config.json", config)
    generation: Json = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 2048, "pad_token_id": 0}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.35.0"})
    write_sentencepiece(folder / "tokenizer.model", held, dummy_prefix=True)
    parts = {"normalizer": LLAMA_NORMALIZER, "decoder": LLAMA_DECODER, "post_processor": beginning("<s>", 1)}
    write_json(folder / "tokenizer.json", sentencepiece_json(held, LLAMA_ADDED, True, **parts))
    own = LLAMA_TOKENIZER | {
        "added_tokens_decoder": decoder_entries(LLAMA_ADDED),
        "bos_token": "<s>",
        "chat_template": templates.ZEPHYR,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": "</s>",
        "padding_side": "right",
        "unk_token": "<unk>",
    }
    write_json(folder / "tokenizer_config.json", own)
    marks = {"bos_token": saved("<s>"), "eos_token": saved("</s>"), "unk_token": saved("<unk>")}
    write_json(folder / "special_tokens_map.json", marks | {"pad_token": saved("</s>")})
    write_weights(folder, draw(decoder_shapes(config), seed=1), torch.bfloat16)


def vicuna(folder: Path) -> None:
    """Write Vicuna's form: tokenizer.model only, no template, sampling settings without do_sample."""
    held = pieces(LLAMA_SPECIALS)
    config = LLAMA_CONFIG | {"vocab_size": len(held.all), "torch_dtype": "float16", "pad_token_id": 0}
    config |= {"_name_or_path": "vicuna-7b-v1.5", "transformers_version": "4.31.0", "num_key_value_heads": 4}
    write_json(folder / "config.json", config)
    generation: Json = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096}
    generation |= {"pad_token_id": 0, "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
    write_json(folder / "generation_config.json", generation)
    write_sentencepiece(folder / "tokenizer.model", held, dummy_prefix=True)
    typed = {f"{name}_token": saved(text, typed=True) for name, text in _MARKS.items()}
    own = {key: value for key, value in LLAMA_TOKENIZER.items() if key != "use_default_system_prompt"}
    own |= typed | {"legacy": False, "model_max_length": 4096, "pad_token": None, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", own)
    marks = {f"{name}_token": saved(text) for name, text in _MARKS.items()}
    write_json(folder / "special_tokens_map.json", marks | {"pad_token": "<unk>"})
    write_weights(folder, draw(decoder_shapes(config), seed=2), torch.float16)


_MARKS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def mistral(folder: Path) -> None:
    """Write Mistral-7B-Instruct-v0.3's form: control tokens in the SentencePiece model, Metaspace in tokenizer.json."""
    controls = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[control_8]"]
    held = pieces([*LLAMA_SPECIALS, *((text, CONTROL) for text in controls)])
    config = {key: value for key, value in LLAMA_CONFIG.items() if key not in ("attention_bias", "pretraining_tp")}
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1000000.0}
    config |= {"attention_dropout": 0.0, "sliding_window": None, "vocab_size": len(held.all)}
    config.pop("rope_scaling")
    write_json(folder / "config.json", config | {"transformers_version": "4.42.0.dev0"})
    generation: Json = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.42.0.dev0"})
    write_sentencepiece(folder / "tokenizer.model", held, dummy_prefix=True)
    added = [*LLAMA_ADDED, *tokens(controls, 3)]
    parts = {"pre_tokenizer": METASPACE, "decoder": LLAMA_DECODER, "post_processor": beginning("<s>", 1)}
    write_json(folder / "tokenizer.json", sentencepiece_json(held, added, False, **parts))
    own = LLAMA_TOKENIZER | {f"{name}_token": text for name, text in _MARKS.items()}
    own |= {"add_prefix_space": True, "added_tokens_decoder": decoder_entries(added), "legacy": False}
    own |= {"chat_template": templates.INST, "model_max_length": LONG, "pad_token": None}
    write_json(folder / "tokenizer_config.json", own | {"spaces_between_special_tokens": False})
    marks = {f"{name}_token": saved(text) for name, text in _MARKS.items()}
    write_json(folder / "special_tokens_map.json", marks)
    write_weights(folder, draw(decoder_shapes(config), seed=3), torch.bfloat16)


def phi3(folder: Path) -> None:
    """Write Phi-3-mini-128k's form: fused projections, longrope, added tokens that eat the space behind them."""
    held = pieces(LLAMA_SPECIALS)
    names = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]
    more = [token(text, len(held.all) + place, rstrip=place > 0) for place, text in enumerate(names)]
    added = [*LLAMA_ADDED[:2], token("</s>", 2, special=False, rstrip=True), *more]
    end, stops = more[0]["id"], [more[place]["id"] for place in (0, 1, 4)]
    config = SIZES | {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0}
    config |= {"bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": end, "hidden_act": "silu", "model_type": "phi3"}
    config |= {"original_max_position_embeddings": 256, "pad_token_id": end, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05}
    factors = {"long_factor": [1.0, 3.0, 9.0, 27.0], "short_factor": [1.0, 1.5, 2.0, 2.5], "type": "longrope"}
    config |= {"rope_scaling": factors, "rope_theta": 10000.0, "sliding_window": 400, "tie_word_embeddings": False}
    config |= {"torch_dtype": "bfloat16", "transformers_version": "4.40.2", "vocab_size": len(held.all) + 16}
    write_json(folder / "config.json", config)
    generation: Json = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": stops, "pad_token_id": end}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.40.2"})
    write_sentencepiece(folder / "tokenizer.model", held, dummy_prefix=True)
    parts = {"normalizer": LLAMA_NORMALIZER, "decoder": LLAMA_DECODER, "post_processor": _only_text(1)}
    write_json(folder / "tokenizer.json", sentencepiece_json(held, added, True, **parts))
    own = LLAMA_TOKENIZER | {"add_bos_token": False, "added_tokens_decoder": decoder_entries(added)}
    own |= {"bos_token": "<s>", "chat_template": templates.PHI3, "eos_token": "<|endoftext|>", "legacy": False}
    own |= {"model_max_length": 512, "pad_token": "<|endoftext|>", "padding_side": "left", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", own)
    write_json(folder / "added_tokens.json", {one["content"]: one["id"] for one in more})
    marks = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", {name: saved(text) for name, text in marks.items()})
    write_weights(folder, draw(fused_shapes(config), seed=4), torch.bfloat16)


GEMMA_FRONT = (("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), ("<mask>", USER_DEFINED))
GEMMA_MORE = ("<unused0>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>")
GEMMA_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")
GEMMA_CONFIG: Json = SIZES | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 20,
    "rms_norm_eps": 1e-06,
    "sliding_window": 8,
}
"""tie_word_embeddings is not among it: the class has it."""


def _gemma_added(held: Pieces) -> list[Json]:
    """List the control tokens, and the user-defined ones, which are not special but for the turns."""
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"}
    numbers = held.vocabulary
    return [token(text, numbers[text], text in special) for text in (*(one[0] for one in GEMMA_FRONT), *GEMMA_MORE)]


def _gemma_tokenizer(folder: Path, held: Pieces, added: list[Json]) -> Json:
    """Write tokenizer.model and tokenizer.json; give back what both versions' tokenizer_config.json share."""
    write_sentencepiece(folder / "tokenizer.model", held, dummy_prefix=False)
    space = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    parts = {"normalizer": SPACES, "pre_tokenizer": space, "decoder": GEMMA_DECODER}
    whole = sentencepiece_json(held, added, True, post_processor=beginning("<bos>", 2), **parts)
    write_json(folder / "tokenizer.json", whole)
    names = ("pad", "eos", "bos", "unk")
    return {f"{name}_token": f"<{name}>" for name in names} | {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder_entries(added),
        "chat_template": templates.GEMMA,
        "clean_up_tokenization_spaces": False,
        "model_max_length": LONG,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }


def gemma2(folder: Path) -> None:
    """Write gemma-2-2b-it's form."""
    held = pieces(GEMMA_FRONT, GEMMA_MORE)
    config = GEMMA_CONFIG | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 5.0, "eos_token_id": 1}
    config |= {"final_logit_softcapping": 10.0, "hidden_act": "gelu_pytorch_tanh", "model_type": "gemma2"}
    config |= {"rope_theta": 20000.0, "torch_dtype": "bfloat16", "transformers_version": "4.42.4"}
    config |= {"vocab_size": len(held.all)}
    write_json(folder / "config.json", config)
    generation: Json = {
        "_from_model_config": True,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
    }
    write_json(folder / "generation_config.json", generation | {"pad_token_id": 0, "transformers_version": "4.42.4"})
    own = _gemma_tokenizer(folder, held, _gemma_added(held))
    own |= {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], "sp_model_kwargs": {}}
    write_json(folder / "tokenizer_config.json", own)
    marks = {f"{name}_token": saved(f"<{name}>") for name in ("bos", "eos", "pad", "unk")}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": turns} | marks)
    tied = decoder_shapes(config | {"tie_word_embeddings": True}, GEMMA_NORMS)
    write_weights(folder, draw(tied, seed=5, zero_centred=True), torch.bfloat16)


def gemma3(folder: Path) -> None:
    """Write gemma-3-1b-it's form: named extra tokens, a processor class, two bases of rotary frequencies, fp32."""
    held = pieces(GEMMA_FRONT, (*GEMMA_MORE, "<start_of_image>", "<end_of_image>"))
    numbers = held.vocabulary
    stops = [1, numbers["<end_of_turn>"]]
    image = token("<image_soft_token>", len(held.all))
    images = [token(text, numbers[text]) for text in ("<start_of_image>", "<end_of_image>")]
    config = GEMMA_CONFIG | {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None}
    config |= {"eos_token_id": stops, "final_logit_softcapping": None, "model_type": "gemma3_text"}
    config |= {"rope_local_base_freq": 5000, "rope_scaling": None, "rope_theta": 250000, "sliding_window_pattern": 2}
    config |= {"torch_dtype": "float32", "transformers_version": "4.50.0.dev0", "vocab_size": len(held.all) + 8}
    write_json(folder / "config.json", config)
    generation: Json = {"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": stops, "top_k": 64}
    write_json(folder / "generation_config.json", generation | {"top_p": 0.95, "transformers_version": "4.50.0.dev0"})
    own = _gemma_tokenizer(folder, held, [*_gemma_added(held), *images, image])
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    own |= named | {"extra_special_tokens": named, "processor_class": "Gemma3Processor", "sp_model_kwargs": None}
    write_json(folder / "tokenizer_config.json", own)
    write_json(folder / "added_tokens.json", {image["content"]: image["id"]})
    marks = {f"{name}_token": saved(f"<{name}>") for name in ("bos", "eos", "pad", "unk")}
    write_json(folder / "special_tokens_map.json", named | marks)
    tied = decoder_shapes(config | {"tie_word_embeddings": True}, GEMMA_NORMS)
    width = head_widths(config)[0] // config["num_attention_heads"]
    tied |= in_layers(config, {f"self_attn.{name}_norm.weight": (width,) for name in "qk"})
    write_weights(folder, draw(tied, seed=6, zero_centred=True), torch.float32)
