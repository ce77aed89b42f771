import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.data.read.conversation import OTHER_COLUMNS, needed_columns, parse_row
from apollo_sft.data.read.messages import MASKS
from apollo_sft.data.read.rows import read_rows
from apollo_sft.errors import DataError
from apollo_sft.types import Conversation, RowRef
from tests.support.data import chat, data_config, write_parquet

REF = RowRef("f.parquet", 7)
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}


def single(row: dict[str, Any], **changes: Any) -> Conversation:
    return parse_row(row, REF, data_config(**changes))


def multi(messages: Any, **row: Any) -> Conversation:
    return parse_row({"messages": messages} | row, REF, data_config(multiturn=True))


def test_a_string_is_text_whatever_the_dict_keys_say() -> None:
    text = '{"question": "not parsed"}'
    parsed = single({"question": text, "answer": "['a']"})
    assert parsed.messages == chat(text, "['a']")
    assert (parsed.tools, parsed.template_kwargs, parsed.ref) == (None, {}, REF)


def test_a_single_turn_run_loads_nothing_for_messages() -> None:
    script = (
        "import sys\n"
        "from apollo_sft.data.read.conversation import parse_row\n"
        "from apollo_sft.data.store import open, tokenise, workers\n"
        "from apollo_sft.types import RowRef\n"
        "from tests.support.data import data_config\n"
        "parse_row({'question': 'a', 'answer': 'b'}, RowRef('f', 0), data_config())\n"
        "print('apollo_sft.data.read.messages' in sys.modules)\n"
        "row = {'messages': [{'role': 'assistant', 'content': 'b'}]}\n"
        "parse_row(row, RowRef('f', 0), data_config(multiturn=True))\n"
        "print('apollo_sft.data.read.messages' in sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[4]
    finished = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", "True"]


def test_the_page_s_extra_info_example() -> None:
    row = {"extra_info": {"question": "What is 2 + 3?", "answer": "2 + 3 = 5", "index": 3}}
    keys = {"prompt_key": "extra_info", "response_key": "extra_info"}
    parsed = single(row, **keys, prompt_dict_keys=("question",), response_dict_keys=("answer",))
    assert parsed.messages == chat("What is 2 + 3?", "2 + 3 = 5")


def test_dict_keys_are_a_path() -> None:
    row = {"question": {"a": {"b": "deep"}}, "answer": "x"}
    assert single(row, prompt_dict_keys=("a", "b")).messages[0]["content"] == "deep"


def test_rl_prompts_are_the_messages_before_the_answer() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert single({"question": prompt, "answer": "Hello"}).messages == [
        *prompt,
        {"role": "assistant", "content": "Hello"},
    ]
    assert single({"question": prompt[1:], "answer": "Hello"}).messages == chat("Hi", "Hello")
    assert single({"question": prompt[1:], "answer": "x"}, prompt_dict_keys=("content",)).messages == chat("Hi", "x")
    assert single({"question": "Hi", "answer": ["Hello"]}).messages == chat("Hi", "Hello")
    answer = [{"role": "assistant", "content": "Hello"}]
    assert single({"question": "Hi", "answer": answer}).messages == chat("Hi", "Hello")


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"question": None, "answer": "x"}, {}, "column question: the cell is null"),
        ({"question": "x", "answer": None}, {}, "column answer: the cell is null"),
        ({"question": 3, "answer": "x"}, {}, "neither text nor a struct"),
        ({"question": {"q": "x"}, "answer": "x"}, {"prompt_dict_keys": ()}, "data.prompt_dict_keys=[q]"),
        ({"question": {"q": "x"}, "answer": "x"}, {"prompt_dict_keys": None}, "the cell is a struct"),
        ({"question": {"q": "x"}, "answer": "x"}, {"prompt_dict_keys": ("z",)}, "no field 'z'"),
        ({"question": {"q": "x"}, "answer": "x"}, {"prompt_dict_keys": ("q", "z")}, "question[q] is not a struct"),
        ({"question": {"q": {"z": 1}}, "answer": "x"}, {"prompt_dict_keys": ("q",)}, "question[q] is not a text"),
        ({"question": [], "answer": "x"}, {}, "the list of messages is empty"),
        ({"question": chat("a", "b"), "answer": "x"}, {}, "the last message of a prompt must be the user's"),
        ({"question": "x", "answer": ["a", "b"]}, {}, "the message is not a struct"),
        ({"question": "x", "answer": chat("a")}, {}, "messages with one of the assistant"),
        ({"question": "x\ud800", "answer": "x"}, {}, "U+D800"),
    ],
)
def test_a_single_turn_row_that_cannot_be_used_names_its_place(row: Any, changes: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        single(row, **changes)
    assert "f.parquet row 7, column" in str(caught.value)
    assert said in str(caught.value)


def test_nulls_that_arrow_filled_in_are_dropped_and_calls_get_content(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
        {"role": "assistant", "content": "2", "tool_calls": []},
    ]
    file = write_parquet(tmp_path / "a.parquet", [{"messages": messages, "tools": None}])
    data = data_config(multiturn=True)
    [(ref, row)] = read_rows([file], needed_columns(data))
    assert set(row["messages"][0]) == {"role", "content", "tool_calls", "tool_call_id"}
    parsed = parse_row(row, ref, data).messages
    assert parsed[0] == {"role": "user", "content": "1 + 1?"}
    function = {"name": "add", "arguments": {"a": 1, "b": None}}
    assert parsed[1] == {"role": "assistant", "content": "", "tool_calls": [CALL | {"function": function}]}
    assert parsed[2] == messages[2]
    assert parsed[3] == {"role": "assistant", "content": "2"}


def test_arguments_as_struct_lose_foreign_keys_and_flat_calls_stay_flat() -> None:
    flat = {"name": "add", "arguments": {"a": 1, "of_another_tool": None}}
    parsed = multi([*chat("x"), {"role": "assistant", "content": "", "tool_calls": [flat]}])
    assert parsed.messages[1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer", "default": None}}}}


def test_tools_as_json_text_or_list() -> None:
    without_null = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}
    assert multi(chat("a", "b"), tools=json.dumps([TOOL])).tools == [TOOL]
    assert multi(chat("a", "b"), tools=[json.dumps(TOOL)]).tools == [TOOL]
    assert multi(chat("a", "b"), tools=[TOOL]).tools == [without_null]
    for nothing in (None, "", "[]", []):
        assert multi(chat("a", "b"), tools=nothing).tools is None
    assert multi(chat("a", "b")).tools is None


def test_enable_thinking_becomes_a_template_argument_of_the_row() -> None:
    assert multi(chat("a", "b"), enable_thinking=False).template_kwargs == {"enable_thinking": False}
    assert multi(chat("a", "b"), enable_thinking=None).template_kwargs == {}


def test_text_parts_are_joined_and_messages_may_be_json_text() -> None:
    parts = [{"type": "text", "text": "good"}, {"type": "text", "text": "bye"}]
    assert multi([{"role": "user", "content": parts}, *chat("x", "y")[1:]]).messages[0]["content"] == "goodbye"
    assert multi(json.dumps(chat("a", "b"))).messages == chat("a", "b")


def test_rows_and_messages_say_that_they_are_not_trained() -> None:
    messages = [*chat("a", "b"), *chat("c", "d")]
    messages[1] = messages[1] | {"train": False}
    messages[3] = messages[3] | {"train": True}
    parsed = multi(messages, train=None)
    assert (parsed.messages, parsed.untrained) == (chat("a", "b", "c", "d"), {1})
    assert multi(messages, train=False).untrained == {0, 1, 2, 3}
    assert single({"question": "a", "answer": "b", "train": False}).untrained == {0, 1}
    assert single({"question": "a", "answer": "b", "train": True}).untrained == set()
    assert single({"question": "a", "answer": "b", "train": 3}, train_key="").untrained == set()
    columns = needed_columns(data_config(train_key="use", system_key="", template_kwargs_key="")).optional
    assert columns == ("tools", "enable_thinking", "use", *OTHER_COLUMNS)


@pytest.mark.parametrize(
    ("messages", "row", "said"),
    [
        (None, {}, "the cell is null"),
        ([], {}, "the list of messages is empty"),
        ("not json", {}, "not valid JSON"),
        ({"role": "user"}, {}, "not a list of messages"),
        (["hello"], {}, "message 0: the message is not a struct"),
        (chat("a"), {}, "no message of the assistant"),
        (
            [{"from": "human", "value": "x"}],
            {},
            "prepare custom --local_dataset_path FILE --local_save_dir FOLDER converts",
        ),
        ([*chat("a"), {"role": "gpt", "content": "b"}], {}, "prepare custom --local_dataset_path FILE"),
        ([*chat("a"), {"role": 5, "content": "x"}], {}, "message 1: the message has no role"),
        ([*chat("a"), {"role": "assistant"}], {}, "message 1: the assistant message has no content"),
        ([{"role": "user", "content": None}], {}, "message 0: the user message has no content"),
        ([{"role": "user", "content": 5}], {}, "the content is not a text"),
        ([{"role": "user", "content": [{"type": "other", "text": "x"}]}], {}, "a part of the content is not a text"),
        ([{"role": "user", "content": [{"type": "image_url", "url": "x"}]}], {}, "images, videos and sound"),
        ([{"role": "user", "content": "a", "images": ["a.png"]}], {}, "images, videos and sound"),
        (chat("a", "b"), {"videos": ["a.mp4"]}, "column videos: images, videos and sound"),
        (chat("a", "b\udfff"), {}, "message 1: character 1 is a lone surrogate"),
        ([*chat("a"), {"role": "assistant", "tool_calls": 5}], {}, "tool_calls is not a list"),
        ([*chat("a"), {"role": "assistant", "tool_calls": "x"}], {}, "not valid JSON"),
        ([*chat("a"), {"role": "assistant", "tool_calls": [{"id": "c"}]}], {}, "no function name"),
        ([*chat("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], {}, "not valid JSON"),
        ([*chat("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], {}, "not an object"),
        ([*chat("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}], {}, "NaN"),
        (chat("a", "b"), {"tools": "{"}, "column tools: the text is not valid JSON"),
        (chat("a", "b"), {"tools": ["[1]"]}, "a tool is not an object"),
        (chat("a", "b"), {"tools": '[{"a": "\\ud800"}]'}, "lone surrogate"),
        (chat("a", "b"), {"enable_thinking": "yes"}, "column enable_thinking: not a truth value"),
        (chat("a", "b"), {"train": 0.5}, "column train: not a truth value"),
        ([{"role": "user", "content": "a", "train": "no"}], {}, "message 0: train is neither 0 nor 1"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], {}, "message 0: weight is neither 0 nor 1"),
        ([{"role": "assistant", "content": "a", "loss": 0, "train": True}], {}, "contradict each other"),
        ([{"role": "user", "content": datetime.date(2024, 1, 1)}], {}, "the content is not a text"),
        ([{"role": "assistant", "content": "a", "reasoning": ["b"]}], {}, "reasoning is not a text"),
        ([{"role": "assistant", "content": "a", "thinking_blocks": [{"type": "redacted"}]}], {}, "thinking_blocks"),
        ([{"role": "assistant", "content": "a", "enable_thinking": "yes"}], {}, "not a truth value"),
        (chat("a", "b"), {"system": 5}, "data.system_key=''"),
        ([{"role": "system", "content": "s"}, *chat("a", "b")], {"system": "t"}, "another system message"),
        (chat("a", "b"), {"chat_template_kwargs": "[1]"}, "not a struct of template arguments"),
        (chat("a", "b"), {"chat_template_kwargs": {"messages": []}}, "messages is set by the trainer"),
        (
            chat("a", "b"),
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            "it contradicts the column enable_thinking",
        ),
    ],
)
def test_a_multi_turn_row_that_cannot_be_used_names_its_place(messages: Any, row: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        multi(messages, **row)
    assert "f.parquet row 7, column" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), (1.0, 0.0)])
def test_masks_of_messages_have_many_names(name: str, yes: Any, no: Any) -> None:
    messages = chat("a", "b", "c", "d")
    messages[1][name] = no
    messages[3][name] = yes
    parsed = multi(messages)
    assert (parsed.messages, parsed.untrained) == (chat("a", "b", "c", "d"), {1})


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_content": "two and two"},
        {
            "reasoning_details": [
                {"type": "reasoning.text", "text": "two "},
                {"type": "reasoning.text", "text": "and two"},
            ]
        },
        {"thinking_blocks": [{"type": "thinking", "thinking": "two and two", "signature": "x"}]},
    ],
)
def test_reasoning_in_parts_becomes_text(said: dict[str, Any]) -> None:
    [_, reply] = multi([*chat("2+2?"), {"role": "assistant", "content": "4"} | said]).messages
    assert reply == {"role": "assistant", "content": "4", "reasoning_content": "two and two"}


def test_older_calls_and_calls_as_text_are_read() -> None:
    function = {"name": "lookup", "arguments": {"word": "oak"}}
    call = {"type": "function", "function": function}
    older = {"role": "assistant", "content": None, "function_call": function | {"arguments": '{"word": "oak"}'}}
    output = {"role": "function", "name": "lookup", "content": "a tree"}
    text = {"role": "assistant", "content": "", "tool_calls": json.dumps([call])}
    for calling in (older, text):
        parsed = multi([*chat("Oak?"), calling, output, *chat("", "A tree.")[1:]]).messages
        assert parsed[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
        assert parsed[2] == {"role": "tool", "name": "lookup", "content": "a tree"}


def test_nulls_of_json_are_kept_and_those_of_columns_are_fillers() -> None:
    function = {"name": "lookup", "arguments": {"word": "oak", "lang": None}}
    messages = [*chat("a"), {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]
    tools = [{"name": "lookup", "default": None}]
    data = data_config(multiturn=True)
    for file, dropped in (("f.jsonl", False), ("f.jsonl.gz", False), ("f.parquet", True), ("f.arrow", True)):
        parsed = parse_row({"messages": messages, "tools": tools}, RowRef(file, 0), data)
        arguments = parsed.messages[1]["tool_calls"][0]["function"]["arguments"]
        assert (arguments == {"word": "oak"}) == dropped
        assert (parsed.tools == [{"name": "lookup"}]) == dropped
        # JSON text has no fillers, wherever it stands.
        texts = {"messages": json.dumps(messages), "tools": json.dumps(tools)}
        assert parse_row(texts, RowRef(file, 0), data).tools == tools


def test_columns_beside_the_messages_are_read() -> None:
    parsed = multi(chat("a", "b"), system="Be brief.", chat_template_kwargs='{"enable_thinking": false, "effort": 3}')
    assert parsed.messages == [{"role": "system", "content": "Be brief."}, *chat("a", "b")]
    assert parsed.template_kwargs == {"enable_thinking": False, "effort": 3}
    assert multi(chat("a", "b"), system="", chat_template_kwargs=None) == multi(chat("a", "b"))

    row = {"question": "a", "answer": "b", "tools": [{"name": "f"}], "enable_thinking": False, "input": "c"}
    parsed = single(row)
    assert (parsed.tools, parsed.template_kwargs, parsed.unread) == (
        [{"name": "f"}],
        {"enable_thinking": False},
        ("input",),
    )
    assert single(row | {"input": ""}).unread == ()


def test_a_completion_of_several_messages_is_the_multi_turn_row() -> None:
    prompt, completion = chat("a"), [*chat("", "b")[1:], {"role": "tool", "content": "c"}, *chat("", "d")[1:]]
    assert single({"question": prompt, "answer": completion}).messages == multi([*prompt, *completion]).messages


def test_a_message_chooses_thinking_itself() -> None:
    messages = chat("a", "b", "c", "d")
    messages[3]["enable_thinking"] = False
    parsed = multi(messages)
    assert (parsed.messages, dict(parsed.thinking)) == (chat("a", "b", "c", "d"), {3: False})


def test_metadata_of_any_type_refuses_nothing() -> None:
    [message, _] = multi(
        [{"role": "user", "content": "a", "at": datetime.date(2024, 1, 1)}, *chat("", "b")[1:]]
    ).messages
    assert message["at"] == "2024-01-01"
