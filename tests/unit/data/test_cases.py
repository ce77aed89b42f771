"""Small inputs on which the trainer was wrong once: the targets are those that a reader of the template expects."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.data.read.conversation import needed_columns, parse_row
from apollo_sft.data.read.rows import try_rows
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.template import resolve_template
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX
from tests.support.data import data_config

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
CASES = SHARED / "cases"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")


def targets(folder: str, file: str, template: str, **changes: Any) -> list[list[str] | str]:
    """The targets of each row in the order of its turns, or the first line of its refusal and what was found."""
    named = CASES / folder / template
    if not named.is_file():
        named = SHARED / "templates" / template
    messages_key = changes.pop("messages_key", "messages")
    data = data_config(multiturn=changes.pop("multiturn", True), chat_template=str(named), **changes)
    data = data.model_copy(update={"multiturn": data.multiturn.model_copy(update={"messages_key": messages_key})})
    one = Renderer(tokenizer(), resolve_template(tokenizer(), data), data)

    found: list[list[str] | str] = []
    for ref, row in try_rows([str(CASES / folder / file)], needed_columns(data)):
        try:
            assert not isinstance(row, DataError), row
            [samples] = one.render([parse_row(row, ref, data)])
        except DataError as error:
            found.append(str(error))
            continue
        texts = []
        for sample in samples:
            ids: list[int] = []
            for label in [*sample.labels.tolist(), IGNORE_INDEX]:
                if label != IGNORE_INDEX:
                    ids.append(label)
                elif ids:
                    texts.append(tokenizer().decode(ids))
                    ids = []
        found.append(texts)
    return found


STOP = "<|im_end|>"
CALL = '<tool_call>\n{"name": "lookup", "arguments": {"word": "oak", "lang": null}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("folder", "file", "template", "changes", "expected"),
    [
        ("asst_first", "rows.jsonl", "t.jinja", {}, [["Welcome.", "Hello."]]),
        ("consec", "rows.jsonl", "t.jinja", {}, [["First.", "Second.", "Third."]]),
        ("gen_header", "rows.jsonl", "t.jinja", {}, [["Hello."]]),
        ("order", "ab.jsonl", "t.jinja", {},
         [['CALL get_weather {"city": "Paris"}', "It is 7."], ["Let me look.", "It is 9."]]),
        ("order", "ba.jsonl", "t.jinja", {},
         [["Let me look.", "It is 9."], ['CALL get_weather {"city": "Paris"}', "It is 7."]]),
        ("tool_opening", "rows.jsonl", "t.jinja", {}, [['[TOOL]get_weather {"city": "Paris"}', "It is 7."]]),
        ("think_inline", "rows.jsonl", "t.jinja", {}, [["Add.\n</think>\n\n5"]]),
        ("think_inline", "inline_think.jsonl", "qwen3.jinja", {}, [["<think>\nlet me see\n</think>\n\n4"]]),
        ("think_inline", "inline_think.jsonl", "qwen3.jinja", {"thinking": "none"}, [["4"]]),
        ("think_inline", "think.jsonl", "qwen3.jinja", {"multiturn": False}, [["4"], ["5"]]),
        ("think_inline", "think.jsonl", "qwen3.jinja", {"multiturn": False, "thinking": "all"},
         [["<think>\n\n</think>\n\n4"], ["<think>\n\n</think>\n\n5"]]),
        ("greeting", "rows.jsonl", "qwen2_5.jinja", {},
         [["Hello."], ["Welcome to the shop.", "Hello."], ["Welcome to the shop.", "Hello."]]),
        ("loss_flags", "rows.jsonl", "qwen2_5.jinja", {},
         [["No: Lima."], ["No: Santiago."], ["No: Havana."], ["No: Vientiane."], ["No: Bamako."], ["No: Muscat."]]),
        ("row_template_kwargs", "rows.jsonl", "qwen3.jinja", {"thinking": "all"},
         [["No."], ["Yes."], ["<think>\n\n</think>\n\nYes."]]),
        ("side_columns", "sys.jsonl", "qwen2_5.jinja", {}, [["Le fer."]]),
        ("unknown_keys", "rows.jsonl", "qwen3.jinja", {}, [
            ['<tool_call>\n{"name": "lookup", "arguments": {"word": "oak"}}\n</tool_call>', "A tree."],
            ['<tool_call>\n{"name": "lookup", "arguments": {"word": "elm"}}\n</tool_call>', "A tree."],
            ["<think>\ntwo and two\n</think>\n\n4"],
            ["<think>\nthree and three\n</think>\n\n6"],
            ["<think>\nfour and four\n</think>\n\n8"],
        ]),
    ],
)  # fmt: skip
def test_the_targets_are_those_that_a_reader_expects(
    folder: str, file: str, template: str, changes: dict[str, Any], expected: list[list[str]]
) -> None:
    found = targets(folder, file, template, **changes)
    assert found == [[text + STOP for text in row] for row in expected]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_template_with_guards(train_on: str) -> None:
    first, second, third = targets("guarded_template", "rows.jsonl", "guard.jinja", train_on=train_on)
    replies = ["easy\n</think>\n\nOak." + STOP, "\n</think>\n\nElm." + STOP]
    greeted = ["\n</think>\n\nWelcome." + STOP, "\n</think>\n\nOak." + STOP]
    if train_on == "all":
        replies = ["Be brief." + STOP, "Name a tree." + STOP, replies[0], "Another." + STOP, replies[1]]
        greeted = ["Be brief." + STOP, greeted[0], "Name a tree." + STOP, greeted[1]]
    assert (first, second) == (replies, greeted)
    assert "System must come first." in third


def test_a_null_that_is_meant_is_kept() -> None:
    for row in targets("genuine_nulls", "rows.jsonl", "qwen2_5.jinja"):
        assert '"lang": null' in row[0]
    data = data_config(multiturn=True, chat_template=str(SHARED / "templates" / "qwen2_5.jinja"))
    for _, row in try_rows([str(CASES / "genuine_nulls" / "rows.jsonl")], needed_columns(data)):
        assert '"default": null' in json.dumps(row) or '\\"default\\": null' in json.dumps(row)


def test_prompts_and_completions_are_read_as_conversations() -> None:
    keys = {"multiturn": False, "prompt_key": "prompt", "response_key": "completion"}
    [one] = targets("prompt_completion_tools", "one.jsonl", "qwen2_5.jinja", **keys)
    [many] = targets("prompt_completion_tools", "many.jsonl", "qwen2_5.jinja", **keys)
    assert one == [CALL]
    assert many == [CALL, "A tree." + STOP]


@pytest.mark.parametrize("file", ["timestamp_key.parquet", "tool_calls_text.parquet"])
def test_metadata_and_calls_as_text_refuse_nothing(file: str) -> None:
    for row in targets("metadata_types", file, "qwen2_5.jinja"):
        assert isinstance(row, list), row
        assert row


def test_a_conversation_of_another_format_names_the_command_that_converts_it() -> None:
    [refused] = targets("side_columns", "share.jsonl", "qwen2_5.jinja", messages_key="conversations")
    assert "apollo-sft prepare custom" in refused
