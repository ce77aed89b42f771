"""Solutions with fences of code and output, as turns."""

import json

import pytest

from apollo_sft.prepare.rejection import RejectedRow
from apollo_sft.prepare.tool_text import TOOLS, parts, runs_code, turns

SOLUTION = """First, we count.

```python
print(1 +
      1)
```
```output
2
```
Then we double.
```Python
print(4)
```

```output
4
```
So \\boxed{4}."""


def test_reasoning_and_calls_by_the_assistant_outputs_by_the_tool() -> None:
    first, output, second, again, last = turns(SOLUTION, as_calls=True)
    assert (first["role"], first["content"]) == ("assistant", "First, we count.")
    (call,) = first["tool_calls"]
    assert call["function"]["name"] == json.loads(TOOLS)[0]["function"]["name"] == "python"
    assert json.loads(call["function"]["arguments"]) == {"code": "print(1 +\n      1)"}
    assert output == {"role": "tool", "content": "2", "tool_call_id": call["id"], "name": "python"}
    assert second["tool_calls"][0]["id"] == again["tool_call_id"] != call["id"]
    assert len(call["id"]) == 9 and call["id"].isalnum()
    assert last == {"role": "assistant", "content": "So \\boxed{4}."}


def test_code_as_text() -> None:
    first, output, *_, last = turns(SOLUTION, as_calls=False)
    assert first == {"role": "assistant", "content": "First, we count.\n```python\nprint(1 +\n      1)\n```"}
    assert output == {"role": "tool", "content": "2"}
    assert "tool_calls" not in last


def test_code_without_reasoning_and_an_empty_output() -> None:
    first, output, _ = turns("```python\nx = 1\n```\n```output\n```\nDone.", as_calls=True)
    assert first["content"] is None and output["content"] == ""
    first, *_ = turns("```python\nx = 1\n```\n```output\n```\nDone.", as_calls=False)
    assert first["content"] == "```python\nx = 1\n```"


def test_fences_of_other_languages_stay_in_the_text() -> None:
    text = "See\n```latex\nx^2\n```\nand\n```\nplain\n```"
    assert parts(text) == [("text", text)]
    assert not runs_code(text) and runs_code("```output\n1\n```") and runs_code("a\n```py\n1\n```")


CODE, OUTPUT = "```python\nprint(1)\n```\n", "```output\n1\n```\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```python\nprint(1)\n", "a code fence is not closed"),
        (f"```python\nprint(1)\n{OUTPUT}done", "a code fence is not closed"),
        (f"{CODE}{OUTPUT}done\n```", "a code fence is not closed"),
        (f"{OUTPUT}done", "an output without code before it"),
        (f"{CODE}{OUTPUT}{OUTPUT}done", "an output without code before it"),
        (f"{CODE}and\n{OUTPUT}done", "code without its output"),
        (f"{CODE}{CODE}{OUTPUT}done", "code without its output"),
        (f"{CODE}", "code without its output"),
        ("Only words.", "no tool is called"),
        (f"{CODE}{OUTPUT}", "there is no text after the last output"),
        ("```python\n\n```\n" + OUTPUT + "done", "a code fence is empty"),
    ],
)
def test_what_does_not_fit_together_is_rejected(text: str, reason: str) -> None:
    with pytest.raises(RejectedRow) as caught:
        turns(text, as_calls=True)
    assert caught.value.reason == reason
