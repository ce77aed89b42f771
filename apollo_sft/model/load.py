"""Find the base model, refuse what cannot be trained exactly, build it: with weights on one rank, on meta elsewhere."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from apollo_sft.errors import ModelError
from apollo_sft.model import attention
from apollo_sft.types import AddedTokens

EXACT_LAYERS = {"full_attention", "sliding_attention", "attention"}
"""Layer types whose only mixing of positions is the attention function that we register."""

MAX_JSON_BYTES = 100_000_000
IMPLEMENTATION = re.compile(r"_?\w+_implementation(?:_internal)?")
"""Keys that name a function for attention or experts. A value with a slash in it would be fetched from the hub."""

HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
HUB_WEIGHTS = "*.safetensors"
HUB_WEIGHT_INDEX = "*.safetensors.index.json"


def find_model(source: str, weights: bool = True) -> Path:
    """Return the folder of a local model, or the local snapshot of a hub id (downloaded when it is not in the cache).

    `weights` false: download configuration and tokenizer only.
    Raises: ModelError when there is no such folder, and the hub has no such model or cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith(("./", "../")) or source.count("/") != 1:
        raise ModelError(
            "model.partial_pretrain is not a model folder",
            found=f"{source} (no such folder)",
            expected="a folder with config.json, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct",
        )

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Without weights the index, which `*.json` matches, must not come either: it would name missing files.
    wanted = HUB_FILES
    unwanted: list[str] | None = [HUB_WEIGHT_INDEX]
    if weights:
        wanted = [*HUB_FILES, HUB_WEIGHTS]
        unwanted = None

    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.partial_pretrain={source} is no local folder and could not be downloaded from the hub",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="check the name and the network, or give the path of a downloaded model folder",
        ) from error


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """Read the transformers config of a model folder.

    Raises: ModelError when there is none that transformers can read, or when it would make transformers run code.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelError("model.partial_pretrain has no config.json", found=folder, expected="a Hugging Face folder")

    # Before transformers reads it, which would import the code.
    raw = _read_json(folder / "config.json")
    _refuse_code(folder, raw, trust_remote_code)
    if raw.get("quantization_config"):
        raise ModelError(
            f"{folder} holds quantised weights, which cannot be trained",
            found=f"quantization_config in config.json: {str(raw['quantization_config'])[:200]}",
            fix="start from the unquantised model",
        )

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a file of others in a library: it may raise anything
        raise ModelError(f"{folder / 'config.json'} cannot be used", found=in_short(error)) from error


def in_short(error: BaseException) -> str:
    """Return the type and the message of a library's error in one line."""
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return name
    return f"{name}: {' '.join(lines[:2])[:300]}"


def _refuse_code(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise a ModelError for what would make transformers import code that is not its own."""
    files = {"config.json": raw}
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        files[tokenizer.name] = _read_json(tokenizer)

    for name, content in files.items():
        for key, value in _items(content):
            if key == "auto_map" and value and not trust_remote_code:
                raise ModelError(
                    f"{folder} brings its own code, which is not run by default",
                    found=f"auto_map in {name}: {str(value)[:200]}",
                    fix="read that code, then set model.trust_remote_code=true; or take auto_map out of that file, "
                    "if transformers knows the model without it",
                )
            if IMPLEMENTATION.fullmatch(key) and "/" in str(value):
                raise ModelError(
                    f"{folder} names code on the hub, which is never fetched",
                    found=f"{key}={value} in {name}",
                    fix=f"take {key} out of that file; model.attn_implementation chooses the attention",
                )


def _items(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the (key, value) of every object inside: parts of a model have configs of their own."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path} is too large", found=f"{path.stat().st_size:,} bytes")

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON", found=error) from error

    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object", found=type(value).__name__)
    return value


def check_architecture(config: Any, trust_remote_code: bool) -> None:
    """Refuse, before any weight is read, an architecture that packed attention cannot serve exactly.

    Raises: ModelError naming the architecture and the reason.
    """
    named = config.architectures if isinstance(config.architectures, list) else []
    name = ", ".join(map(str, named)) or type(config).__name__
    model_class = _model_class(config, trust_remote_code)
    if model_class is None:
        raise ModelError(
            f"{name} is not a causal language model that transformers knows",
            found=f"model_type {config.model_type}",
            expected="a model of AutoModelForCausalLM",
        )

    _check_layers(name, config.get_text_config())
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ModelError(
            f"{name} cannot be trained exactly here: its attention bypasses transformers' AttentionInterface",
            found="recurrent layers, or attention that the model computes itself",
            expected="a model class with _supports_attention_backend",
        )

    _check_router_loss(name, config.get_text_config())


def _check_layers(name: str, config: Any) -> None:
    foreign = sorted(set(getattr(config, "layer_types", None) or []) - EXACT_LAYERS)
    if foreign:
        raise ModelError(
            f"{name} cannot be trained exactly here: some layers mix packed documents in a way that is not supported",
            found=f"layer types {foreign}",
            expected=f"only {sorted(EXACT_LAYERS)}",
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):  # "vision" is causal in text
        raise ModelError(
            f"{name} cannot be trained here: its attention is not causal", found="use_bidirectional_attention=true"
        )


def _check_router_loss(name: str, config: Any) -> None:
    """Raise a ModelError when a config adds the load-balancing loss of experts, which is not part of our loss."""
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", None) != 0:
        raise ModelError(
            f"{name} adds the auxiliary loss of its router, which is not part of the loss here",
            found="output_router_logits=true in config.json",
            fix="set output_router_logits to false in config.json to train on the targets alone",
        )


def longest_exact_document(config: Any) -> int | None:
    """Return the length beyond which a document changes the rotary embedding of its whole pack; None is no limit.

    Source: arXiv:2402.13753 (LongRoPE); transformers picks one set of factors for a whole forward, by its longest
    document.
    """
    # One set of parameters for all layers, or one for each type of layers.
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters]
    if all(isinstance(value, dict) for value in parameters.values()):
        each = list(parameters.values())

    limits = [p["original_max_position_embeddings"] for p in each if p.get("rope_type") == "longrope"]
    return min(limits, default=None)


def check_longest(config: Any, tokens: int) -> None:
    """Refuse documents of up to `tokens` tokens where the rotary embedding depends on what is packed together.

    Raises: ModelError.
    """
    limit = longest_exact_document(config)
    if limit is not None and tokens > limit:
        raise ModelError(
            f"{type(config).__name__}: its rotary embedding (longrope) changes with the longest document of a pack",
            found=f"documents of up to {tokens} tokens",
            expected=f"at most {limit} (original_max_position_embeddings)",
            fix=f"data.max_length={limit}",
        )


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], config._name_or_path)
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def with_rows(config: Any, rows: int) -> Any:
    """Return a copy of a transformers config with so many embeddings."""
    own = copy.deepcopy(config)
    own.get_text_config().vocab_size = rows
    return own


def load_with_weights(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool,
    new_tokens: AddedTokens | None = None,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """Load the whole model on the CPU with its weights in `dtype`.

    `config`: with `new_tokens`, that of the model with the added tokens. `check` is called with the model as the files
    hold it, before the tokens are added.
    Raises: ModelError when the folder holds no safetensors, or when weights are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    held = config
    if new_tokens is not None:
        held = with_rows(config, new_tokens.held)

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_own_config(held, dtype),
            dtype=dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder} has no weights that can be loaded",
            found=in_short(error),
            expected="model.safetensors, or shards with model.safetensors.index.json (pickled weights are not read)",
        ) from error

    # transformers would fill these with random numbers.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{folder} does not hold all weights of {type(model).__name__}",
            found=f"{len(missing)} missing or of another shape: {', '.join(missing[:5])}",
            fix="train from the complete model",
        )

    if check is not None:
        check(model)

    if new_tokens is not None:
        _add_rows(model, new_tokens)

    return _checked(model)


@torch.no_grad()
def _add_rows(model: Any, new_tokens: AddedTokens) -> None:
    """Add rows to embeddings and head, and set those of the added tokens to the mean of the rows of earlier tokens.

    Source: transformers' `resize_token_embeddings`, which draws them closely around that mean. Drawn numbers would
    depend on the state of a generator.
    """
    # Forked: resizing draws random numbers all the same.
    if new_tokens.rows > new_tokens.held:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(new_tokens.rows, mean_resizing=False)

    # Weights, which may be tied, and the bias of a head: each tensor once.
    tables = [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]
    for table in {id(table): table for table in tables}.values():
        table[list(new_tokens.ids)] = table[: new_tokens.known].mean(0, dtype=torch.float64).to(table.dtype)


def build_on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Build the same model without memory: every parameter and buffer on the meta device.

    Raises: ModelError when transformers cannot build a model from this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                _own_config(config, dtype),
                dtype=dtype,
                attn_implementation=attention.NAME,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a config of others in a library: it may raise anything
        raise ModelError(f"{type(config).__name__}: no model can be built from it", found=in_short(error)) from error

    return _checked(model)


def _own_config(config: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a config for one model, which writes into it."""
    own = copy.deepcopy(config)
    # Grouped products of experts do not support float64: one expert at a time.
    if dtype == torch.float64:
        own._experts_implementation = "eager"
    return own


def _checked(model: Any) -> Any:
    """Return the model in training mode. Raises: ModelError when it is not built as we need it."""
    used = model.config._attn_implementation
    if used != attention.NAME:
        raise ModelError(f"{type(model).__name__} did not take the packed attention function", found=used)
    if model.base_model is model or model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} is not built as a backbone with a head on top")
    return model.train()
