"""Prepare what training starts from: the base model, its tokenizer and template, and the tokenised data."""

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
from apollo_sft.types import AddedTokens, BaseModel

if TYPE_CHECKING:
    from apollo_sft.data.batch.mixture import Mixture


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training starts from."""

    base: BaseModel
    hf_config: Any
    tokenizer: Any
    template: ChatTemplate
    train: SampleStore
    val: SampleStore | None

    train_sources: Mixture | None = None
    """The named sources of the training data; None where they have no names."""

    val_sets: Mixture | None = None
    """The named sets of the validation data; None where they have no names."""

    @property
    def data_key(self) -> str:
        """Return the key of the training data and of how they are mixed: the same key gives the same epochs."""
        sources = self.train_sources
        if sources is None or sources.is_plain:
            return self.train.key
        return f"{self.train.key} taking {sources.takes} of {sources.sizes} samples"

    @property
    def sources(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the `source_figures` of train and validation, where they have named sources."""
        found = {}
        if self.train_sources is not None:
            found["train"] = source_figures(self.train, self.train_sources)
        if self.val is not None and self.val_sets is not None:
            found["validation"] = source_figures(self.val, self.val_sets)
        return found


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
    if base.new_tokens is not None:
        say(_new_tokens_in_words(base.new_tokens))
    changed = None
    if not is_own(tokenizer, template):
        changed = template.text
    with about_the_base():
        rehearse(base, tokenizer, changed, (), trust)

    train, train_of = _store(config.data, "train", tokenizer, template)
    # The stop tokens are known only now: the tokenizer's files are tried once more where they change them.
    stops = tuple(train.summary.stop_tokens)
    if end_token(tokenizer, changed, stops) is not None:
        with about_the_base():
            rehearse(base, tokenizer, changed, stops, trust)
    val: SampleStore | None = None
    val_of: dict[str, int] = {}
    if config.data.val_files:
        val, val_of = _store(config.data, "val", tokenizer, template)

    for store in (train, val):
        if store is not None:
            _check_token_ids(store, hf_config)
    sources = _mixture(train, config.data.train_files, train_of, "data.train_files")
    val_sets: Mixture | None = None
    if val is not None:
        val_sets = _mixture(val, config.data.val_files, val_of, "data.val_files")
    return Prepared(base, hf_config, tokenizer, template, train, val, sources, val_sets)


def _new_tokens_in_words(new_tokens: AddedTokens) -> str:
    if new_tokens.rows > new_tokens.held:
        rows = f"the embedding table grows from {new_tokens.held:,} to {new_tokens.rows:,} rows"
    else:
        rows = f"the new tokens use unused rows of the existing {new_tokens.held:,}-row embedding table"
    return f"added to the tokenizer: {', '.join(new_tokens.tokens)}; {rows}; new rows start as the mean of the others"


def _store(
    data: DataConfig, split: Literal["train", "val"], tokenizer: Any, template: ChatTemplate
) -> tuple[SampleStore, dict[str, int]]:
    """Return the store of a split, and which of its named entries each file belongs to."""
    entries: Entries
    if split == "train":
        entries = data.train_files
        max_rows = data.train_max_samples
    else:
        entries = data.val_files
        max_rows = data.val_max_samples

    of_files = _source_of_files(entries, f"data.{split}_files")  # before anything is read
    request = StoreRequest(split, paths_of(entries), max_rows, tokenizer, template, data)
    return prepare_store(request, say), of_files


def _source_of_files(entries: Entries, key: str) -> dict[str, int]:
    """Return which of the named entries each file belongs to. Raises: DataError when one belongs to two."""
    found: dict[str, int] = {}
    names = list(named(entries))
    for number, entry in enumerate(named(entries).values()):
        for file in map(shown, expand_paths(own_paths(entry), key)):  # as the store names it
            if found.setdefault(file, number) != number:
                raise DataError(
                    f"{key}: the sources {names[found[file]]} and {names[number]} hold the same file",
                    found=file,
                    fix="leave it out of one of them; a weight repeats samples",
                )
    return found


def _mixture(store: SampleStore, entries: Entries, of_files: dict[str, int], key: str) -> Mixture | None:
    """Return how the named entries mix the samples of the store; None where none has a name.

    Raises: DataError as `mixture`.
    """
    if not any(named(entries)):
        return None
    from apollo_sft.data.batch.mixture import Part, mixture

    parts = []
    for name, entry in named(entries).items():
        if isinstance(entry, Source):
            parts.append(Part(name, entry.weight, entry.max_samples))
        else:
            parts.append(Part(name))

    of_file = np.bincount(store.sources, minlength=len(store.summary.files))
    sizes = [0] * len(parts)
    for file, count in zip(store.summary.files, of_file.tolist(), strict=True):
        sizes[of_files[file]] += count
    return mixture(parts, sizes, key)


def _check_positions(max_length: int, source: str, hf_config: Any) -> None:
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            "data.max_length is above the number of positions that the model supports",
            found=max_length,
            expected=f"at most {positions} (max_position_embeddings of {source})",
            fix=f"data.max_length={positions}",
        )


def _check_token_ids(store: SampleStore, hf_config: Any) -> None:
    rows = hf_config.get_text_config().vocab_size
    if store.summary.max_token_id >= rows:
        raise DataError(
            "the tokenizer gives token ids that the model has no embedding for",
            found=f"token id {store.summary.max_token_id}",
            expected=f"ids below {rows} (vocab_size in config.json)",
            fix="use the tokenizer that belongs to the model",
        )
