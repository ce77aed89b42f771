"""All that can be known before a weight is read: the model's files, the tokenizer, the data, and whether they fit."""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from apollo_sft.checkpoint.publish import read_json
from apollo_sft.checkpoint.tensor_files import read_base_tensors
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.store import SampleStore, StoreRequest, prepare_store
from apollo_sft.data.template import ChatTemplate, resolve_template
from apollo_sft.errors import ConfigError, DataError, ModelError
from apollo_sft.model.load import check_architecture, check_longest, find_model, read_config
from apollo_sft.report.log import say
from apollo_sft.types import BaseModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training starts from."""

    base: BaseModel
    hf_config: Any
    tokenizer: Any
    template: ChatTemplate
    train: SampleStore
    val: SampleStore | None


def load_external_lib(name: str | None) -> None:
    """Import the user's module first of all, so that it can register tokenizers, configs and models."""
    if name is None:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "model.external_lib cannot be imported",
            found=f"{name}: {error}",
            expected="the name of a module on PYTHONPATH",
        ) from error


def seed_everything(seed: int, rank: int) -> None:
    """Ranks draw different dropout masks; data order and initial weights do not depend on these generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed + rank)


def prepare(config: SftConfig) -> Prepared:
    """Find the model, check its architecture, tokenise the data once. One process of a host does the work.

    Raises: ConfigError, ModelError, DataError.
    """
    folder = find_model(config.model.partial_pretrain)
    hf_config = read_config(folder, config.model.trust_remote_code)
    check_architecture(hf_config, config.model.trust_remote_code)
    tensors = read_base_tensors(folder)
    _check_positions(config, hf_config)
    check_longest(hf_config, config.data.max_length)
    tokenizer = _load_tokenizer(folder, config.model.trust_remote_code)
    template = resolve_template(tokenizer, config.data)
    train = _store(config, "train", tokenizer, template)
    val = _store(config, "val", tokenizer, template) if config.data.val_files else None
    for store in (train, val):
        if store is not None:
            _check_token_ids(store, hf_config)
    base = BaseModel(config.model.partial_pretrain, folder, read_json(folder / "config.json"), tensors)
    return Prepared(base, hf_config, tokenizer, template, train, val)


def _store(config: SftConfig, split: Literal["train", "val"], tokenizer: Any, template: ChatTemplate) -> SampleStore:
    data = config.data
    paths = data.train_files if split == "train" else data.val_files
    max_rows = data.train_max_samples if split == "train" else data.val_max_samples
    return prepare_store(StoreRequest(split, paths, max_rows, tokenizer, template, data), say)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise _no_tokenizer(folder, str(error).splitlines()[0]) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes some from no file at all
        raise _no_tokenizer(folder, f"a {type(tokenizer).__name__} without a vocabulary")
    return tokenizer


def _no_tokenizer(folder: Path, found: str) -> ModelError:
    return ModelError(
        f"no tokenizer can be loaded from {folder}",
        found=found,
        expected="tokenizer.json and tokenizer_config.json",
        fix="put the tokenizer's files beside the model's",
    )


def _check_positions(config: SftConfig, hf_config: Any) -> None:
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            "data.max_length is above the number of positions that the model knows",
            found=config.data.max_length,
            expected=f"at most {positions} (max_position_embeddings of {config.model.partial_pretrain})",
            fix=f"data.max_length={positions}",
        )


def _check_token_ids(store: SampleStore, hf_config: Any) -> None:
    rows = hf_config.get_text_config().vocab_size
    if store.summary.max_token_id >= rows:
        raise DataError(
            "the tokenizer writes token ids that the model has no embedding for",
            found=f"token id {store.summary.max_token_id}",
            expected=f"ids below {rows} (vocab_size in config.json)",
            fix="use the tokenizer that belongs to the model",
        )
