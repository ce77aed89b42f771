"""The two layouts that are written. A row of the first one serves SFT and RL, with the same prompt text in both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from apollo_sft.data.read.files import Row

GSM8K_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
KNOWN_INSTRUCTIONS = (
    GSM8K_INSTRUCTION,
    BOXED_INSTRUCTION,
    "Let's think step by step and output the final answer within \\boxed{}.",
)
"""Instructions at the end of questions that were prepared here or by verl, or at the beginning (AlphaApollo). They are
removed, so that none is there twice."""

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
QUESTION_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("index", pa.int64()),
                    ("question", pa.string()),
                    ("answer", pa.string()),
                    ("raw_question", pa.string()),
                ]
            ),
        ),
    ]
)
_CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
CHAT_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        (
            "messages",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("content", pa.string()),
                        ("reasoning_content", pa.string()),
                        ("tool_calls", pa.list_(_CALL)),
                        ("tool_call_id", pa.string()),
                        ("name", pa.string()),
                        ("train", pa.bool_()),
                        ("enable_thinking", pa.bool_()),
                    ]
                )
            ),
        ),
        ("tools", pa.string()),
        ("train", pa.bool_()),
        ("enable_thinking", pa.bool_()),
        ("chat_template_kwargs", pa.string()),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64()), ("ground_truth", pa.string())])),
    ]
)


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a row: the data set's name, the split, and the row's number in the split, from 0."""

    data_source: str
    split: str
    index: int

    is_json: bool = False
    """The row comes from JSON lines, in which a null is meant."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """The text at the end of the user's turn, after the question. There is never a system message."""

    text: str
    separator: str = " "

    def prompt(self, raw_question: str) -> str:
        """Return a question with the instruction."""
        if not self.text:
            return raw_question
        return f"{raw_question}{self.separator}{self.text}"


def without_instruction(question: str) -> str:
    """Return a question without the instruction that this program, verl or AlphaApollo has added."""
    for text in KNOWN_INSTRUCTIONS:
        question = question.removesuffix(text).removeprefix(text).strip()
    return question


def question_row(origin: Origin, question: str, raw_question: str, answer: str, truth: str | None) -> Row:
    """Return a row of QUESTION_SCHEMA. `question`: with its instruction, the text of the prompt in SFT and in RL.

    `truth`: the final answer that a reward compares with; None where there is none.
    """
    return {
        "data_source": origin.data_source,
        "prompt": [{"role": "user", "content": question}],
        "question": question,
        "answer": answer,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {
            "split": origin.split,
            "index": origin.index,
            "question": question,
            "answer": answer,
            "raw_question": raw_question,
        },
    }


def chat_row(origin: Origin, messages: list[dict[str, Any]], tools: str | None, truth: str | None) -> Row:
    """Return a row of CHAT_SCHEMA. `tools`: JSON text; arguments of calls are JSON text too."""
    return {
        "data_source": origin.data_source,
        "messages": messages,
        "tools": tools,
        "extra_info": {"split": origin.split, "index": origin.index, "ground_truth": truth},
    }
