"""Final answers in worked solutions: what stands in the last `\\boxed{}`, or after the last `####`."""

from __future__ import annotations

from apollo_sft.model.final_answers import BOX, MARKER, THOUSANDS, braced
from apollo_sft.prepare.rejection import RejectedRow


def final_answer(text: str) -> str | None:
    """The last boxed answer, else the one after the last `####`; None when there is neither.

    Raises: RejectedRow when the last box is not closed, or is empty.
    """
    boxed = last_boxed(text)
    return marked(text) if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{}` of `text`, however deep the braces in it; None when there is no box.

    Raises: RejectedRow when that box is not closed, or is empty.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    box = boxes[-1]
    inside = box["bare"] if box["bare"] is not None else braced(text[box.end() :])
    if inside is None:
        raise RejectedRow("the last \\boxed{ is not closed")
    if not inside.strip():
        raise RejectedRow("the last \\boxed{} is empty")
    return inside.strip()


def marked(text: str) -> str | None:
    """What follows the last `####` on its line, without thousands separators: `1234` of `#### 1,234`; or None."""
    if MARKER not in text:
        return None
    line = text.rpartition(MARKER)[2].strip().partition("\n")[0]
    return THOUSANDS.sub("", line.strip()) or None
