"""Templates x kinds of conversation x tokenizers: what is trained is what a reader of the template expects.

The expected texts stand in tests/fixtures/targets, written by reading the templates. The table in the docs:
`APOLLO_WRITE_DOCS=1 pytest tests/unit/data/render/test_targets.py`.
"""

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apollo_sft.data.read.conversation import parse_row
from apollo_sft.data.render.render import Rendered, Renderer
from apollo_sft.data.render.template import resolve_template
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, RowRef, Sample
from tests.support.data import data_config
from tests.support.documents import section, table

SHARED = Path(__file__).resolve().parents[4].parent / "shared"
FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "targets"
ROWS = json.loads((FIXTURES / "conversations.json").read_text(encoding="utf-8"))
EXPECTED = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(FIXTURES.glob("*.json"))
    if path.stem != "conversations"
}
TOKENIZERS = ("gpt2", "phi3", "qwen3", "smollm2")
MOST_REFUSED = 0.03

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]


@cache
def tokenizer(name: str) -> Any:
    """With the control tokens of all the templates."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    wanted = {token for expected in EXPECTED.values() for token in expected["control_tokens"]}
    missing = sorted(wanted - set(found.get_added_vocab()))
    found.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return found


def renderer(template: str, tokenizer_name: str, **changes: Any) -> Renderer:
    data = data_config(multiturn=True, chat_template=str(SHARED / "templates" / f"{template}.jinja"), **changes)
    tok = tokenizer(tokenizer_name)
    return Renderer(tok, resolve_template(tok, data), data)


def conversation(kind: str) -> Conversation:
    return parse_row(ROWS[kind], RowRef(kind, 0), data_config(multiturn=True))


def target_ids(samples: list[Sample]) -> list[list[int]]:
    """The ids of each stretch of targets, in the order of the turns."""
    found = []
    for sample in samples:
        is_target = np.append(False, sample.labels[:-1] != IGNORE_INDEX)
        edges = np.flatnonzero(np.diff(is_target, append=False, prepend=False))
        stretches = [sample.input_ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
        found += list(zip(sample.turns, stretches, strict=True))
    return [ids for _, ids in sorted(found)]


def bare(text: str) -> str:
    """Without white space, in the form that some tokenizers bring text into. phi3 decodes `▁` to a space."""
    return "".join(unicodedata.normalize("NFC", text.replace("▁", " ")).split())


def wrong_targets(kind: str, expected: list[str], one: Renderer, tok: Any) -> int | None:
    """Turns whose target is not the expected one, by characters or by tokens; None where the row is refused."""
    row = conversation(kind)
    [result] = one.try_render([row])
    if isinstance(result, DataError):
        return None
    assert isinstance(result, Rendered)
    with one.sandbox.bounded():
        texts = one.layouts.lay_out(row).texts
    spans = sorted((span.turn, text.text[span.start : span.end]) for text in texts for span in text.spans)
    spans = [(turn, said) for turn, said in spans if said]  # a blank reply without a stop has no target
    wanted = [text.replace("{eos}", tok.eos_token) for text in expected]
    by_tokens = target_ids(result.samples)
    assert len(by_tokens) == len(wanted), (kind, [tok.decode(ids) for ids in by_tokens])
    return sum(
        said != want or bare(tok.decode(ids)) != bare(want)
        for (_, said), ids, want in zip(spans, by_tokens, wanted, strict=True)
    )


@pytest.mark.parametrize("template", EXPECTED)
def test_no_target_is_wrong(template: str) -> None:
    expected = EXPECTED[template]
    for name in TOKENIZERS:
        one = renderer(template, name)
        for kind in ROWS:
            wanted = expected["targets"].get(kind, [])
            wrong = wrong_targets(kind, wanted, one, tokenizer(name))
            refused = kind in expected["refused"] or kind in expected.get("refused_with", {}).get(name, {})
            assert wrong == (None if refused else 0), (template, name, kind)


def test_few_cells_are_refused() -> None:
    refused = sum(len(expected["refused"]) for expected in EXPECTED.values())
    assert len(EXPECTED) == 12
    assert refused <= MOST_REFUSED * len(EXPECTED) * len(ROWS)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_the_training_twin_agrees_token_by_token(template: str, name: str) -> None:
    """The twin's own tags and our spans, but for white space; and its targets are those of the plain template.

    The tags mark an empty think block too, as data.thinking=all does.
    """
    tok = tokenizer(name)
    for kind, wanted in EXPECTED[template]["targets"].items():
        row = conversation(kind)
        assert wrong_targets(kind, wanted, renderer(f"{template}_training", name), tok) == 0, kind
        one = renderer(f"{template}_training", name, thinking="all")
        [[sample]] = one.render([row])
        theirs = tok.apply_chat_template(
            row.messages,
            row.tools,
            chat_template=one.template.text,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert sample.input_ids.tolist() == theirs["input_ids"]
        ours = [False, *(sample.labels[:-1] != IGNORE_INDEX).tolist()]
        for token, mine, other in zip(theirs["input_ids"], ours, theirs["assistant_masks"], strict=True):
            assert mine == bool(other) or not tok.decode([token]).strip()


def test_the_table_in_the_docs_is_current() -> None:
    rows, notes = [], []
    for template, expected in EXPECTED.items():
        cells = [
            "refused"
            if kind in expected["refused"]
            else f"{len(expected['targets'][kind])} of "
            f"{sum(message['role'] == 'assistant' for message in ROWS[kind]['messages'])}"
            for kind in ROWS
        ]
        rows.append([template, *cells])
        for kind, note in (expected["refused"] | expected["notes"]).items():
            notes.append(f"* {template}, {kind}: {note}.\n")
    text = table(["template", *ROWS], rows) + "\n" + "".join(notes)
    assert section("templates.md", "targets", text) == text
