"""All that can be known before a weight is read: the model's files, the tokenizer, the data, and whether they fit."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from apollo_sft.checkpoint.agree import free_bytes
from apollo_sft.checkpoint.model_folder.conversion import plan_export
from apollo_sft.checkpoint.model_folder.tensor_files import num_bytes, safe_path
from apollo_sft.checkpoint.model_folder.tokenizer_files import end_token, rehearse
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.checkpoint.run_folder.resume import whole_checkpoints
from apollo_sft.checkpoint.run_folder.state import num_bytes as checkpoint_bytes
from apollo_sft.config.schema import SftConfig, Source
from apollo_sft.config.sources import Entries, named, own_paths, paths_of
from apollo_sft.data.batch.mixture import Mixture, Part, mixture
from apollo_sft.data.read.files import expand_paths, shown
from apollo_sft.data.render.template import ChatTemplate, is_own
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.data.store.audit import source_figures
from apollo_sft.data.store.open import SampleStore, StoreRequest, prepare_store
from apollo_sft.errors import CheckpointError, ConfigError, DataError, ModelError
from apollo_sft.model import attention, liger
from apollo_sft.model.load import build_on_meta, check_longest
from apollo_sft.model.lora import ADAPTER_FILE, check_adapter_file, check_groups, inject, lora_config
from apollo_sft.report.log import say
from apollo_sft.train.base_model import check_copied, in_words, load_tokenizer, no_weights, open_base
from apollo_sft.train.optim.build import build_optimizer, state_bytes
from apollo_sft.train.precision import DTYPES
from apollo_sft.types import BaseModel, Growth


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training starts from. `train_sources`, `val_sets`: what lies in the stores, where it has names."""

    base: BaseModel
    hf_config: Any
    tokenizer: Any
    template: ChatTemplate
    train: SampleStore
    val: SampleStore | None
    train_sources: Mixture | None = None
    val_sets: Mixture | None = None

    @property
    def data_key(self) -> str:
        """Of the training data and how they are mixed: two runs with the same one train on the same epochs."""
        sources = self.train_sources
        mixed = "" if sources is None or sources.is_plain else f" taking {sources.takes} of {sources.sizes} samples"
        return f"{self.train.key}{mixed}"

    @property
    def sources(self) -> dict[str, dict[str, dict[str, float]]]:
        """What `source_figures` says of train and validation, where they have named sources."""
        train = {} if self.train_sources is None else {"train": source_figures(self.train, self.train_sources)}
        if self.val is None or self.val_sets is None:
            return train
        return train | {"validation": source_figures(self.val, self.val_sets)}


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


def make_deterministic() -> None:
    """Operations that would not give the same bits each time are refused by torch. Before CUDA is used.

    Source: docs.pytorch.org/docs/stable/notes/randomness.html.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int, rank: int) -> None:
    """Ranks draw different dropout masks; data order and initial weights do not depend on these generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed + rank)


def prepare(config: SftConfig, weights: bool = True) -> Prepared:
    """Find the model, check its architecture, tokenise the data once. One process of a host does the work.

    `weights` false: none is downloaded.

    Raises: ConfigError, ModelError, DataError.
    """
    base, hf_config = open_base(config, weights)
    trust = config.model.trust_remote_code
    _check_positions(config, hf_config)
    check_longest(hf_config, config.data.max_length)
    tokenizer = load_tokenizer(base.folder, trust)
    template = fit_template(tokenizer, config.data, config.model.add_special_tokens)
    if base.growth is not None:
        say(_growth_in_words(base.growth))
    changed = None if is_own(tokenizer, template) else template.text
    with _about_the_base():
        rehearse(base, tokenizer, changed, (), trust)
    train, train_of = _store(config, "train", tokenizer, template)
    stops = tuple(train.summary.stop_tokens)
    if end_token(tokenizer, changed, stops) is not None:  # which nothing could know before
        with _about_the_base():
            rehearse(base, tokenizer, changed, stops, trust)
    val, val_of = _store(config, "val", tokenizer, template) if config.data.val_files else (None, {})
    for store in (train, val):
        if store is not None:
            _check_token_ids(store, hf_config)
    sources = _mixture(train, config.data.train_files, train_of, "data.train_files")
    val_sets = None if val is None else _mixture(val, config.data.val_files, val_of, "data.val_files")
    return Prepared(base, hf_config, tokenizer, template, train, val, sources, val_sets)


def _growth_in_words(growth: Growth) -> str:
    grown = f"embeddings grow from {growth.held:,} to {growth.rows:,} rows"
    unused = f"they take rows of the {growth.held:,} embeddings that stood for nothing"
    return (
        f"added to the tokenizer: {', '.join(growth.tokens)}; "
        f"{grown if growth.rows > growth.held else unused}, the new ones begin as the mean of the others"
    )


@contextmanager
def _about_the_base() -> Iterator[None]:
    """What fails is a file of the base model, not one of a checkpoint. Raises: ModelError."""
    try:
        yield
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def check_model(config: SftConfig) -> dict[str, Any]:
    """Build the model without memory and hold it against its files and the disk: what would else fail much later.

    Returns what run.json says of the base's folder: what is carried over, written as it is, left out.
    Raises: ModelError, ConfigError.
    """
    base, hf_config = open_base(config)
    liger.check_family(config.model, hf_config.model_type)
    if not base.tensors:
        raise no_weights(base.folder)
    attention.register(attention.sdpa_kernel)  # its name must be known; nothing runs
    master = DTYPES[config.model.fsdp_config.model_dtype]
    causal_lm = build_on_meta(hf_config, master, config.model.trust_remote_code)
    adapter = config.model.lora_adapter_path
    with _about_the_base():
        if (base.folder / "generation_config.json").is_file():
            read_json(base.folder / "generation_config.json")
        plan = plan_export(causal_lm, base, config.trainer.export_dtype)
        _check_layer_names(config, causal_lm)
        for name in (ADAPTER_FILE, "adapter_config.json") if adapter is not None else ():
            safe_path(Path(str(adapter)), name, config.model.follow_links)
    check_copied(base, plan.copied)
    wanted = lora_config(config.model, base.source)
    if wanted is not None and base.growth is not None:
        raise _adapter_on_grown(base.growth)
    if wanted is not None:
        inject(causal_lm, wanted, master)
        check_groups(causal_lm, config.model)
    if adapter is not None:
        check_adapter_file(causal_lm, adapter)
    files_bytes = sum((base.folder / name).stat().st_size for name in base.carried)
    _check_disk(config, causal_lm, sum(map(num_bytes, plan.tensors.values())) + files_bytes, wanted is not None)
    for line in in_words(base, plan.copied, config.trainer.export != "adapter"):
        say(line)
    files = {"carried_files": base.carried, "files_left_out": base.left_out}
    return {"base": files | {"copied_tensors": plan.copied, "untied": base.untied}}


def _check_disk(config: SftConfig, causal_lm: Any, model_bytes: int, is_lora: bool) -> None:
    """The disk must hold two checkpoints and the finished model. A run that goes on has one of them already.

    Raises: ConfigError.
    """
    root, contents = Path(config.trainer.default_local_dir), config.trainer.checkpoint.save_contents
    hf_bytes = checkpoint_bytes(causal_lm, 0, ["model"]) if is_lora else model_bytes
    moments = state_bytes(build_optimizer(causal_lm, config.optim))
    one = checkpoint_bytes(causal_lm, moments, contents) + ("hf_model" in contents) * hf_bytes
    has_one = any(whole_checkpoints(root / "checkpoints"))
    needed = (1 if has_one else 2) * one + (config.trainer.export != "adapter") * model_bytes
    if free_bytes(root) < needed:
        raise ConfigError(
            f"trainer.default_local_dir={root} has no room for two checkpoints and the finished model",
            found=f"{free_bytes(root):,} bytes free",
            expected=f"{needed:,} bytes ({one:,} a checkpoint)",
            fix="make room, choose another trainer.default_local_dir, or leave hf_model out of "
            "trainer.checkpoint.save_contents",
        )


def _adapter_on_grown(growth: Growth) -> ConfigError:
    return ConfigError(
        "model.add_special_tokens with LoRA: the adapter would be one of a model that is nowhere in a folder",
        found=f"{', '.join(growth.tokens)}, which the base model does not know",
        fix="model.lora_rank=0; or add them once, with transformers (add_tokens, resize_token_embeddings, "
        "save_pretrained), and train that folder with the embeddings in model.modules_to_save",
    )


def _check_layer_names(config: SftConfig, causal_lm: Any) -> None:
    wanted = config.model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap
    known = {type(module).__name__ for module in causal_lm.modules()}
    if wanted and not known & set(wanted):
        raise ConfigError(
            "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap names no module of this model",
            found=", ".join(wanted),
            expected=f"one of {', '.join(sorted(known))}",
        )


def _store(
    config: SftConfig, split: Literal["train", "val"], tokenizer: Any, template: ChatTemplate
) -> tuple[SampleStore, dict[str, int]]:
    """The store of a split, and which of its named entries each file belongs to."""
    data = config.data
    entries, key = (data.train_files, "data.train_files") if split == "train" else (data.val_files, "data.val_files")
    of_files = _source_of_files(entries, key)  # before anything is read
    paths = paths_of(entries)
    max_rows = data.train_max_samples if split == "train" else data.val_max_samples
    return prepare_store(StoreRequest(split, paths, max_rows, tokenizer, template, data), say), of_files


def _source_of_files(entries: Entries, key: str) -> dict[str, int]:
    """Which of the named entries each file belongs to. Raises: DataError when one belongs to two."""
    found: dict[str, int] = {}
    names = list(named(entries))
    for number, entry in enumerate(named(entries).values()):
        for file in map(shown, expand_paths(own_paths(entry), key)):  # as the store names it
            if found.setdefault(file, number) != number:
                raise DataError(
                    f"{key}: {names[found[file]]} and {names[number]} are two sources with the same file",
                    found=file,
                    fix="leave it out of one of them; a weight repeats samples",
                )
    return found


def _mixture(store: SampleStore, entries: Entries, of_files: dict[str, int], key: str) -> Mixture | None:
    """What the entries ask of the samples in the store, where they have names. Raises: DataError as `mixture`."""
    parts = [
        Part(name, entry.weight, entry.max_samples) if isinstance(entry, Source) else Part(name)
        for name, entry in named(entries).items()
    ]
    if not parts:
        return None
    of_file = np.bincount(store.sources, minlength=len(store.summary.files))
    sizes = [0] * len(parts)
    for file, count in zip(store.summary.files, of_file.tolist(), strict=True):
        sizes[of_files[file]] += count
    return mixture(parts, sizes, key)


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
