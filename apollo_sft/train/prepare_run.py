"""What training starts from: the base model, its tokenizer and template, and the tokenised data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from apollo_sft.checkpoint.model_folder.tokenizer_files import end_token, rehearse
from apollo_sft.config.schema import DataConfig, SftConfig, Source
from apollo_sft.config.sources import Entries, named, own_paths, paths_of
from apollo_sft.data.read.files import expand_paths, shown
from apollo_sft.data.render.template import ChatTemplate, is_own
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.data.store.audit import source_figures
from apollo_sft.data.store.open import SampleStore, StoreRequest, prepare_store
from apollo_sft.errors import ConfigError, DataError
from apollo_sft.model.load import check_longest
from apollo_sft.report.log import say
from apollo_sft.train.base_model import about_the_base, load_tokenizer, open_base
from apollo_sft.types import BaseModel, Growth

if TYPE_CHECKING:
    from apollo_sft.data.batch.mixture import Mixture


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


def prepare(config: SftConfig, weights: bool = True) -> Prepared:
    """Find the model, check its architecture, tokenise the data once. One process of a host does the work.

    `weights` false: none is downloaded.

    Raises: ConfigError, ModelError, DataError.
    """
    base, hf_config = open_base(config, weights)
    trust = config.model.trust_remote_code
    _check_positions(config.data.max_length, config.model.partial_pretrain, hf_config)
    check_longest(hf_config, config.data.max_length)
    tokenizer = load_tokenizer(base.folder, trust)
    template = fit_template(tokenizer, config.data, config.model.add_special_tokens)
    if base.growth is not None:
        say(_growth_in_words(base.growth))
    changed = None if is_own(tokenizer, template) else template.text
    with about_the_base():
        rehearse(base, tokenizer, changed, (), trust)
    train, train_of = _store(config.data, "train", tokenizer, template)
    stops = tuple(train.summary.stop_tokens)
    if end_token(tokenizer, changed, stops) is not None:  # which nothing could know before
        with about_the_base():
            rehearse(base, tokenizer, changed, stops, trust)
    val, val_of = _store(config.data, "val", tokenizer, template) if config.data.val_files else (None, {})
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


def _store(
    data: DataConfig, split: Literal["train", "val"], tokenizer: Any, template: ChatTemplate
) -> tuple[SampleStore, dict[str, int]]:
    """The store of a split, and which of its named entries each file belongs to."""
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
    if not any(named(entries)):
        return None
    from apollo_sft.data.batch.mixture import Part, mixture

    parts = [
        Part(name, entry.weight, entry.max_samples) if isinstance(entry, Source) else Part(name)
        for name, entry in named(entries).items()
    ]
    of_file = np.bincount(store.sources, minlength=len(store.summary.files))
    sizes = [0] * len(parts)
    for file, count in zip(store.summary.files, of_file.tolist(), strict=True):
        sizes[of_files[file]] += count
    return mixture(parts, sizes, key)


def _check_positions(max_length: int, source: str, hf_config: Any) -> None:
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            "data.max_length is above the number of positions that the model knows",
            found=max_length,
            expected=f"at most {positions} (max_position_embeddings of {source})",
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
