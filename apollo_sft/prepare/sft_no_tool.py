"""Prepare informal-math for models that call no tools: solutions that run code are left out."""

from __future__ import annotations

from dataclasses import replace

from apollo_sft.data.read.files import Row
from apollo_sft.prepare import informal_math
from apollo_sft.prepare.preparation import Task
from apollo_sft.prepare.records import Origin
from apollo_sft.prepare.rejection import RejectedRow
from apollo_sft.prepare.tool_text import runs_code


def task(data_source: str, instruction: str | None) -> Task:
    """Return the task, as `informal_math.task`."""
    plain = informal_math.task(data_source, instruction)

    def convert(row: Row, origin: Origin) -> Row:
        made = plain.convert(row, origin)
        if runs_code(made["answer"]):
            raise RejectedRow("the answer runs code: `apollo-sft prepare sft-tool` keeps it")
        return made

    return replace(plain, dataset="sft-no-tool", convert=convert)
