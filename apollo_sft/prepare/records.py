"""The two layouts that are written. One row of the first serves SFT and RL, with the same prompt text in both."""

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
"""What questions that were prepared before end with (here, by verl) or begin with (by AlphaApollo): it is taken off, so
that none stands twice."""

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
                    ]
                )
            ),
        ),
        ("tools", pa.string()),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64()), ("ground_truth", pa.string())])),
    ]
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row comes from: the data set's name, the split, and the row's number in the split, from 0."""

    data_source: str
    split: str
    index: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the user's turn ends with, after the question. There is never a system message."""

    text: str
    separator: str = " "

    def prompt(self, raw_question: str) -> str:
        return f"{raw_question}{self.separator}{self.text}" if self.text else raw_question


def without_instruction(question: str) -> str:
    """The question as it was before this program, verl's or AlphaApollo's put an instruction to it."""
    for text in KNOWN_INSTRUCTIONS:
        question = question.removesuffix(text).removeprefix(text).strip()
    return question


def question_row(origin: Origin, question: str, raw_question: str, answer: str, truth: str | None) -> Row:
    """A row of QUESTION_SCHEMA. `question`: with its instruction, the text of the prompt in SFT and in RL.

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
    """A row of CHAT_SCHEMA. `tools`: JSON text; arguments of calls are JSON text too."""
    return {
        "data_source": origin.data_source,
        "messages": messages,
        "tools": tools,
        "extra_info": {"split": origin.split, "index": origin.index, "ground_truth": truth},
    }
