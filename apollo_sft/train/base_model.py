"""The base model on disk: its files, its config, and what must be changed in it before it is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.model_folder.base_files import sort_files
from apollo_sft.checkpoint.model_folder.tensor_files import FOREIGN_FORMS, StoredTensor, read_base, some, specs_of
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.config.schema import DataConfig, ModelConfig, SftConfig
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.errors import CheckpointError, ModelError
from apollo_sft.model.load import check_architecture, find_model, in_short, read_config, with_rows
from apollo_sft.train.weights import untied_in_files
from apollo_sft.types import AddedTokens, BaseModel

ADAPTER_CONFIG = "adapter_config.json"
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "module.": "DistributedDataParallel",
    "base_model.model.": "PEFT",
}
"""What wrappers of a model put before the names of its weights, and who does."""


def open_base(config: SftConfig, weights: bool = True) -> tuple[BaseModel, Any]:
    """Read the model folder, and transformers' config of it, checking the files before a library reads them.

    Where config.json ties the head to the embeddings and the files hold two different tensors, both are trained, and
    the returned config does not tie them. `weights` false: none is downloaded.
    Raises: ModelError.
    """
    model = config.model
    folder = find_model(model.partial_pretrain, weights)
    _refuse_adapter(folder, model.partial_pretrain)
    stored = read_base(folder, model.follow_links)
    _refuse_wrapped(folder, stored)

    hf_config = read_config(folder, model.trust_remote_code)
    check_architecture(hf_config, model.trust_remote_code)
    raw = read_json(folder / "config.json")

    untied = untied_in_files(hf_config, stored, model.trust_remote_code)
    if untied:
        raw, hf_config = _untied(raw, hf_config)

    fitted = _fitted(model, config.data, folder)
    new_tokens = _new_tokens(fitted, hf_config)
    if new_tokens is not None:
        raw = _with_rows(raw, hf_config, new_tokens.rows)
        hf_config = with_rows(hf_config, new_tokens.rows)

    files = sort_files(folder, model.follow_links, model.trust_remote_code)
    tokens: tuple[str, ...] = ()
    if fitted is not None:
        tokens = fitted.added
    of_files = (files.carried, files.left_out)
    base = BaseModel(model.partial_pretrain, folder, raw, specs_of(stored), new_tokens, tokens, untied, *of_files)
    return base, hf_config


def as_files_hold(folder: Path, model: ModelConfig) -> Any:
    """Read transformers' config of a model folder as `open_base` does, without added tokens. Raises: ModelError."""
    trust = model.trust_remote_code
    hf_config = read_config(folder, trust)
    stored = read_base(folder, model.follow_links)
    if not untied_in_files(hf_config, stored, trust):
        return hf_config
    return _untied({}, hf_config)[1]


def _refuse_adapter(folder: Path, source: str) -> None:
    """Refuse an adapter in the place of a model, or beside one. `source`: the value of `model.partial_pretrain`.

    Raises: ModelError.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds a model and an adapter, so it is not clear which of the two to train",
            found=f"config.json and {ADAPTER_CONFIG}",
            expected="one of them",
            fix=f"move {ADAPTER_CONFIG} and adapter_model.safetensors to a folder of their own; to train that adapter "
            "further, set model.lora_adapter_path to that folder",
        )
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "the model that it was trained on"
    raise ModelError(
        f"model.partial_pretrain={source} is a LoRA adapter, not a model",
        found=f"{ADAPTER_CONFIG} and no config.json",
        expected="a folder with config.json and all weights of a model",
        fix=f"model.partial_pretrain={base} model.lora_adapter_path={source}",
    )


def _refuse_wrapped(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """Refuse weights that were saved from a wrapped model: transformers finds none of them. Raises: ModelError."""
    for prefix, who in WRAPPERS.items():
        wrapped = [name for name in stored if name.startswith(prefix)]
        if wrapped and len(wrapped) > len(stored) // 2:
            raise ModelError(
                f"the names of the weights in {folder} are those of a model wrapped by {who}",
                found=f"{len(wrapped)} of {len(stored)} names begin with {prefix}, such as {wrapped[0]}",
                expected=wrapped[0].removeprefix(prefix),
                fix=f"save the model inside the wrapper, or remove {prefix} from the names: load_file, "
                "rename, save_file of safetensors.torch",
            )


def check_copied(base: BaseModel, copied: Sequence[str]) -> None:
    """Refuse added tokens where a tensor that is not trained would need rows for them. Raises: ModelError."""
    if base.new_tokens is None or base.new_tokens.rows == base.new_tokens.held:
        return
    tables = [name for name in copied if base.tensors[name].shape[:1] == (base.new_tokens.held,)]
    if tables:
        raise ModelError(
            "model.add_special_tokens: the files hold tables of all tokens that training does not use, and cannot grow",
            found=", ".join(tables[:3]),
            fix="a tokenizer that has these tokens, or data.chat_template=plain",
        )


def in_words(base: BaseModel, copied: Sequence[str], writes_model: bool) -> list[str]:
    """Return a line for each part of the base that the written folder holds or lacks beside what is trained."""
    lines = []
    if base.untied:
        consequence = "and whoever loads the adapter must load the base untied too: transformers 4 ties them"
        if writes_model:
            consequence = "and tie_word_embeddings=false is written into config.json"
        lines.append(
            f"the base's config.json ties {' and '.join(base.untied)}, but its files hold two different tensors: both "
            f"are used, {consequence}"
        )
    if copied and writes_model:
        lines.append(f"copied unchanged from the base, since training does not use them: {some(copied)}")
    if base.left_out and writes_model:
        named = [f"{name} ({why})" for name, why in base.left_out.items()]
        lines.append(f"not copied from the base's folder: {some(named)}")
    return lines


def new_tokens_of(model: ModelConfig, data: DataConfig, folder: Path, hf_config: Any) -> AddedTokens | None:
    """Return what `model.add_special_tokens` adds to the model in `folder`; None when nothing is missing.

    Raises: ModelError, DataError.
    """
    return _new_tokens(_fitted(model, data, folder), hf_config)


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A tokenizer that was fitted to the template."""

    tokenizer: Any

    before: dict[str, int]
    """Ids by token, of the base's own tokenizer."""

    added: tuple[str, ...]
    """What became an added token, whether it is new or was a word of the vocabulary."""


def _fitted(model: ModelConfig, data: DataConfig, folder: Path) -> _Fitted | None:
    """Fit the base's tokenizer, where `model.add_special_tokens` asks for it."""
    if not model.add_special_tokens:
        return None
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    before = tokenizer.get_vocab()
    known = set(tokenizer.get_added_vocab())
    fit_template(tokenizer, data, add=True)

    added = sorted((number, token) for token, number in tokenizer.get_added_vocab().items() if token not in known)
    return _Fitted(tokenizer, before, tuple(token for _, token in added))


def _new_tokens(fitted: _Fitted | None, hf_config: Any) -> AddedTokens | None:
    """Find the rows that the embeddings need. A word of the vocabulary that becomes a control token keeps its row."""
    if fitted is None:
        return None
    held = hf_config.get_text_config().vocab_size
    before = fitted.before
    added = {fitted.tokenizer.convert_tokens_to_ids(token): token for token in fitted.added if token not in before}
    if not added:
        return None

    ids = sorted(added)
    # Models often have more rows than their tokenizer has tokens: then the new tokens need none.
    rows = max(held, ids[-1] + 1)
    known = min(held, max(before.values()) + 1)
    fresh = sorted({*ids, *range(held, rows)})
    return AddedTokens(tuple(added[number] for number in ids), tuple(fresh), known, held, rows)


def _with_rows(raw: dict[str, Any], hf_config: Any, rows: int) -> dict[str, Any]:
    """Set the number of embeddings in config.json; in a model of text and images, in the config of its text."""
    parts = _text_parts(hf_config)
    changed = raw | {key: raw.get(key, {}) | {"vocab_size": rows} for key in parts}
    if not parts or "vocab_size" in raw:
        changed["vocab_size"] = rows
    return changed


def _untied(raw: dict[str, Any], hf_config: Any) -> tuple[dict[str, Any], Any]:
    """Return config.json, and transformers' config, for a model whose head is a weight of its own.

    In a model of text and images transformers 5 reads that from the whole config, transformers 4 from the text's.
    """
    own = copy.deepcopy(hf_config)
    own.tie_word_embeddings = own.get_text_config().tie_word_embeddings = False
    texts = {key: raw.get(key, {}) | {"tie_word_embeddings": False} for key in _text_parts(hf_config)}
    return raw | texts | {"tie_word_embeddings": False}, own


def _text_parts(hf_config: Any) -> list[str]:
    """Return the keys of config.json that hold the config of the text model; none where it is config.json itself."""
    text = hf_config.get_text_config()
    return [key for key in type(hf_config).sub_configs if getattr(hf_config, key, None) is text]


def no_weights(folder: Path) -> ModelError:
    """Return the error about a folder without weights that can be read; it names the weights in other formats."""
    others = sorted(path.name for path in folder.iterdir() if path.suffix in FOREIGN_FORMS)
    found = "no weight file"
    if others:
        found = f"only {', '.join(others[:5])}"
    return ModelError(
        f"{folder} has no weights that can be loaded",
        found=found,
        expected="model.safetensors, or shards with model.safetensors.index.json (pickled weights are not read: "
        "opening a pickle can run code)",
        fix="if you trust the files, convert them once: "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
    )


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Open the tokenizer of a model folder. Raises: ModelError when there is none that can be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # foreign files in a library: it may raise anything
        raise _no_tokenizer(folder, in_short(error)) from error
    try:
        special_ids = tokenizer.all_special_ids
    except RecursionError as error:  # looking for the id of an unknown token gives that of unk_token
        raise _no_tokenizer(folder, f"unk_token {tokenizer.unk_token!r}, which is not in its vocabulary") from error
    if len(tokenizer) <= len(special_ids):  # transformers makes some from no file at all
        raise _no_tokenizer(folder, f"a {type(tokenizer).__name__} without a vocabulary")
    return tokenizer


def _no_tokenizer(folder: Path, found: str) -> ModelError:
    return ModelError(
        f"no tokenizer can be loaded from {folder}",
        found=found,
        expected="tokenizer.json and tokenizer_config.json",
        fix="put the tokenizer's files beside the model's",
    )


@contextmanager
def about_the_base() -> Iterator[None]:
    """Raise an error about a checkpoint's files as one about the base model: the same code reads both.

    Raises: ModelError.
    """
    try:
        yield
    except CheckpointError as error:
        raise ModelError(str(error)) from error
