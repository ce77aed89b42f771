"""The base's tokenizer files, with what training changed in them: template, end token, added tokens.

They are changed in the base's own form. Rewritten by a library they would have the form of its version, which
earlier versions cannot open.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.model_folder.json_files import change_json
from apollo_sft.checkpoint.model_folder.sidecars import copy_files
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.errors import CheckpointError
from apollo_sft.types import BaseModel

CONFIG = "tokenizer_config.json"
BACKEND = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_HOLDERS = (CONFIG, "chat_template.json", "processor_config.json")
"""JSON files that may hold the chat template under `chat_template`."""
NAMED_TEMPLATES = "additional_chat_templates"
END_HOLDERS = (CONFIG, "special_tokens_map.json")
NAMES = (
    CONFIG, BACKEND, TEMPLATE, "chat_template.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files that belong to a tokenizer; `is_tokenizer_file` knows some more by their endings."""


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file of a model folder, by its path in it, belongs to the tokenizer."""
    return name in NAMES or name.endswith(".tiktoken") or name.startswith((f"{NAMED_TEMPLATES}/", "tokenization_"))


def end_token(tokenizer: Any, chat_template: str | None, stop_token_ids: Sequence[int]) -> str | None:
    """Return the token that must become the tokenizer's `eos_token`; None when it stays as it is.

    It is the token that ended the trained turns, if there is only one: RL trainers find the end of a reply by
    `eos_token`. A template that writes `eos_token` by name would write something else then, so it keeps its token.
    """
    template = tokenizer.chat_template if chat_template is None else chat_template
    if len(stop_token_ids) != 1 or "eos_token" in str(template) or stop_token_ids[0] == tokenizer.eos_token_id:
        return None
    return str(tokenizer.convert_ids_to_tokens(stop_token_ids[0]))


def change_tokenizer(
    folder: Path, base: BaseModel, tokenizer: Any, chat_template: str | None, stop_token_ids: Sequence[int]
) -> None:
    """Change the base's tokenizer files, which were copied into `folder`.

    `tokenizer`: the one of the training. `chat_template`: the one of the training, None where it is the tokenizer's
    own, which is in the files already. `stop_token_ids`: the tokens that ended the trained turns.
    """
    if base.added_tokens:
        _add_tokens(folder, tokenizer, base.added_tokens)

    if chat_template is not None:
        _set_template(folder, chat_template)

    end = end_token(tokenizer, chat_template, stop_token_ids)
    if end is not None:
        _set_end(folder, end)


def rehearse(
    base: BaseModel, tokenizer: Any, chat_template: str | None, stops: Sequence[int], trust_remote_code: bool
) -> None:
    """Change a copy of the files in a temporary folder, and check that it opens as the tokenizer of the training.

    Done at the start of a run, so that a form of files that cannot be changed does not come to light at its end.
    Arguments as of `change_tokenizer`. Nothing is done where nothing is changed.
    Raises: CheckpointError when another tokenizer comes out of it.
    """
    end = end_token(tokenizer, chat_template, stops)
    if not base.added_tokens and chat_template is None and end is None:
        return

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        opened = [name for name in base.carried if is_tokenizer_file(name) or name.endswith(("config.json", ".py"))]
        copy_files(folder, base, opened)
        change_tokenizer(folder, base, tokenizer, chat_template, stops)

        try:
            written = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # foreign files in a library: it may raise anything
            raise _unchangeable(base, f"{type(error).__name__}: {error}") from error

    # The added tokens between words: flags such as `lstrip` show only beside other text.
    probe = f"a {' b '.join(base.added_tokens)} c"
    template = tokenizer.chat_template if chat_template is None else chat_template
    is_same = {
        "other tokens": written.get_vocab() == tokenizer.get_vocab(),
        "other ids of a text": written(probe)["input_ids"] == tokenizer(probe)["input_ids"],
        "another end token": written.eos_token == (end or tokenizer.eos_token),
        "another chat template": written.chat_template == template,
    }
    for difference, same in is_same.items():
        if not same:
            raise _unchangeable(base, f"{difference} in the changed files")


def _unchangeable(base: BaseModel, found: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer files in {base.folder} cannot be changed as this training needs it",
        found=found,
        expected="tokenizer.json and tokenizer_config.json, as transformers writes them",
        fix="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) rewrites them in that form",
    )


def _set_template(folder: Path, text: str) -> None:
    """Write the template wherever the base has one.

    Named templates are removed: transformers would take the one named `tool_use` for rows with tools, while the
    training took this one for all rows.
    """
    if (folder / NAMED_TEMPLATES).exists():
        shutil.rmtree(folder / NAMED_TEMPLATES)

    holders = [name for name in TEMPLATE_HOLDERS if "chat_template" in _read(folder / name)]
    for name in holders:
        change_json(folder / name, _read(folder / name) | {"chat_template": text})

    if (folder / TEMPLATE).is_file():
        (folder / TEMPLATE).write_text(text, encoding="utf-8")
    elif CONFIG not in holders:  # every version of transformers reads it there
        change_json(folder / CONFIG, _read(folder / CONFIG) | {"chat_template": text})


def _set_end(folder: Path, token: str) -> None:
    for name in END_HOLDERS:
        content = _read(folder / name)
        if name != CONFIG and not content:
            continue

        # A token may be written as a text, or as an object with its flags, which stay.
        new: Any = token
        old = content.get("eos_token")
        if isinstance(old, dict):
            new = old | {"content": token}

        change_json(folder / name, content | {"eos_token": new})


def _add_tokens(folder: Path, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens, with the ids and flags that `tokenizer` gives them, in each file where the base lists its own."""
    added = {}
    for token in tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        kept = tokenizer.added_tokens_decoder[number]
        flags = {name: getattr(kept, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added[number] = {"content": token, **flags}

    backend = _read(folder / BACKEND)
    config = _read(folder / CONFIG)
    if backend:
        entries = {entry["id"]: entry for entry in backend.get("added_tokens") or []}
        entries |= {number: {"id": number, **entry} for number, entry in added.items()}
        change_json(folder / BACKEND, backend | {"added_tokens": [entries[number] for number in sorted(entries)]})

    # A slow tokenizer has no tokenizer.json: it reads them from here.
    if not backend or "added_tokens_decoder" in config:
        decoder = config.get("added_tokens_decoder") or {}
        decoder = decoder | {str(number): entry for number, entry in added.items()}
        change_json(folder / CONFIG, config | {"added_tokens_decoder": decoder})

    listed = _read(folder / "added_tokens.json")
    if listed:
        listed |= {entry["content"]: number for number, entry in added.items()}
        change_json(folder / "added_tokens.json", listed)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
