"""Tokenizers of published models go through an export unchanged, with the template that was used."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from apollo_sft.checkpoint.model_folder.base_files import sort_files
from apollo_sft.checkpoint.model_folder.sidecars import copy_files
from apollo_sft.checkpoint.model_folder.tokenizer_files import change_tokenizer
from apollo_sft.types import BaseModel

SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "tokenizers"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEXTS = ["A plain line.", "  two  spaces\n\ttab", "héllo ﬁne 你好 👩‍👩‍👧", "<|im_start|>user\nx<|im_end|>"]


@cache
def published(folder: Path) -> Any:
    """Return the tokenizer as it is published. The test checks that nothing changes it."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt2", "phi3", "qwen3", "smollm2"])
@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_ids_and_template_survive(tmp_path: Path, name: str, template: str | None) -> None:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip("../shared/tokenizers is not here")
    before = published(folder)
    own = before.chat_template
    base = BaseModel(str(folder), folder, {}, {}, carried=sort_files(folder).carried)
    copy_files(tmp_path, base, base.carried)
    change_tokenizer(tmp_path, base, before, template, ())
    if template is None:
        for copied in base.carried:
            assert (tmp_path / copied).read_bytes() == (folder / copied).read_bytes()
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert after(TEXTS)["input_ids"] == before(TEXTS)["input_ids"]
    assert after.chat_template == (template or own)
    assert before.chat_template == own
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)
    change_tokenizer(tmp_path, base, before, TEMPLATE, (7,))
    told = AutoTokenizer.from_pretrained(tmp_path)
    assert (told.eos_token_id, told.pad_token) == (7, before.pad_token)
    assert told(TEXTS)["input_ids"] == before(TEXTS)["input_ids"]
    for path in tmp_path.iterdir():
        assert str(folder).encode() not in path.read_bytes(), f"{path.name} names a private path"
