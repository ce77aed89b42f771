"""Conversations as others write them."""

import json
from collections import Counter
from typing import Any

import pytest

from apollo_sft.prepare.chat_shapes import messages_of, tools_of
from apollo_sft.prepare.rejection import RejectedRow

USER = {"role": "user", "content": "Weather?"}
DONE = {"role": "assistant", "content": "Sunny."}


def call(identity: str | None = None, arguments: Any = '{"city": "Bonn"}') -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def calling(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), "name": None}


def output(identity: str | None = None, content: str = "sun") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": identity}


def test_sharegpt_becomes_messages() -> None:
    chat = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny."},
    ]
    messages = messages_of(json.dumps(chat))
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    (made,) = messages[2]["tool_calls"]
    assert made["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert messages[3] == {"role": "tool", "content": "sun", "tool_call_id": made["id"]}
    assert len(made["id"]) == 9 and made["id"].isalnum()


def test_openai_keeps_ids_and_drops_what_arrow_filled_in() -> None:
    messages = messages_of(
        [USER, calling(call("a"), call("b", {"city": "Ulm", "day": None})), output("b"), output("a"), DONE]
    )
    assert [c["id"] for c in messages[1]["tool_calls"]] == ["a", "b"]
    assert messages[1]["tool_calls"][1]["function"]["arguments"] == '{"city": "Ulm"}'
    assert messages[1]["content"] is None and "name" not in messages[1]
    assert [message.get("tool_call_id") for message in messages] == [None, None, "b", "a", None]


def test_older_calls_parts_and_empty_outputs() -> None:
    old = {"role": "assistant", "content": "", "function_call": {"name": "weather", "arguments": ""}}
    messages = messages_of(
        [
            {"role": "user", "content": [{"type": "text", "text": "Weather"}, "?"]},
            old,
            {"role": "function", "name": "weather", "content": ""},
            DONE,
        ]
    )
    assert messages[0]["content"] == "Weather?"
    assert messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
    assert messages[2]["role"] == "tool" and messages[2]["content"] == ""


def test_a_conversation_may_end_with_calls_and_one_output_may_answer_several() -> None:
    assert len(messages_of([USER, calling(call("a"), call("b"))])) == 2
    assert len(messages_of([USER, calling(call(), call()), output(), DONE])) == 4


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (None, "no conversation"),
        ("hello", "a text that should be JSON is not"),
        ([], "no conversation"),
        ([USER], "no turn of the assistant"),
        ([USER, {"role": "assistant", "content": " "}], "an empty turn of the assistant"),
        ([{"role": "user", "content": None}, DONE], "an empty turn of the user"),
        ([{"role": "narrator", "content": "x"}, DONE], "an unknown role: 'narrator'"),
        ([USER, output("a"), DONE], "an output without a call before it"),
        ([USER, calling(call("a")), DONE], "a call without its output"),
        ([USER, calling(call("a"), call("b")), output("a"), DONE], "a call without its output"),
        ([USER, calling(call("a"), call("b")), output("a")], "a call without its output"),
        ([USER, calling(call("a")), output("z"), DONE], "an output whose tool_call_id is not that of a call before it"),
        ([USER, calling(call("a", "{")), output("a"), DONE], "a text that should be JSON is not"),
        ([USER, calling(call("a", "[1]")), output("a"), DONE], "the arguments of a tool call are no JSON object"),
        ([USER, calling({"id": "a"}), output("a"), DONE], "a tool call without a function's name"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, DONE], "a part of a turn is not text"),
    ],
)
def test_what_is_no_conversation_is_rejected(chat: Any, reason: str) -> None:
    with pytest.raises(RejectedRow) as caught:
        messages_of(chat)
    assert caught.value.reason == reason


def test_tools_become_json() -> None:
    tool = {"type": "function", "function": {"name": "weather", "strict": None}}
    expected = '[{"type": "function", "function": {"name": "weather"}}]'
    assert tools_of([tool]) == expected
    # In JSON a null is meant.
    for cell in (json.dumps([tool]), [json.dumps(tool)]):
        assert tools_of(cell, keeps_nulls=True) == json.dumps([tool])
    assert tools_of(json.dumps([tool])) == json.dumps([tool])
    assert tools_of("") is None and tools_of(None) is None and tools_of("[]") is None
    for cell in ("{", '{"a": 1}', [1]):
        with pytest.raises(RejectedRow):
            tools_of(cell)


def test_no_text_is_changed_and_what_a_turn_says_of_its_training_is_kept() -> None:
    code = "    a = 1\n    return a\n"
    chat = [
        {"role": "developer", "content": " Be kind. "},
        {"role": "user", "content": "\tBody?\n"},
        {"role": "assistant", "content": "   ", "weight": 0},
        {"role": "assistant", "content": "", "loss": False},
        {"role": "assistant", "content": code, "enable_thinking": False, "id": "m1", "reasoning": " hm "},
    ]
    left_out: Counter[str] = Counter()
    messages = messages_of(chat, left_out=left_out)
    assert [message["content"] for message in messages] == [" Be kind. ", "\tBody?\n", "   ", "", code]
    assert [message.get("train") for message in messages] == [None, None, False, False, None]
    assert messages[-1]["enable_thinking"] is False
    assert messages[-1]["reasoning_content"] == " hm "
    assert left_out == {"messages.id": 1}


def test_nulls_of_json_are_kept() -> None:
    chat = [USER, calling(call("a", {"city": "Ulm", "day": None})), output("a"), DONE]
    for cell, keeps_nulls in ((chat, True), (json.dumps(chat), False)):
        [made] = messages_of(cell, keeps_nulls)[1]["tool_calls"]
        assert made["function"]["arguments"] == '{"city": "Ulm", "day": null}'


def test_calls_in_a_row_are_parallel_calls() -> None:
    chat = [
        {"from": "human", "value": "Two?"},
        *({"from": "function_call", "value": json.dumps({"name": "age", "arguments": {"n": n}})} for n in (1, 2)),
        *({"from": "observation", "value": str(n)} for n in (26, 25)),
        {"from": "gpt", "value": "26 and 25."},
    ]
    messages = messages_of(chat)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [made["function"]["arguments"] for made in messages[1]["tool_calls"]] == ['{"n": 1}', '{"n": 2}']
    assert [message["tool_call_id"] for message in messages[2:4]] == [made["id"] for made in messages[1]["tool_calls"]]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"images": ["a.png"]}, "images, videos or sound"),
        ({"weight": 0.5}, "keys about the training of a turn that are not one of true and false"),
        ({"weight": 0, "train": True}, "keys about the training of a turn that are not one of true and false"),
        ({"thinking_blocks": [{"type": "redacted"}]}, "a part of thinking_blocks is not text"),
    ],
)
def test_what_would_be_lost_is_rejected(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedRow) as caught:
        messages_of([USER, DONE | turn])
    assert caught.value.reason == reason
