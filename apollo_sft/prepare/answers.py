"""Find final answers in worked solutions: in the last `\\boxed{}`, or after the last `####`."""

from __future__ import annotations

from apollo_sft.model.final_answers import BOX, MARKER, THOUSANDS, braced
from apollo_sft.prepare.rejection import RejectedRow


def final_answer(text: str) -> str | None:
    """Return the last boxed answer, else the one after the last `####`; None when there is neither.

    Raises: RejectedRow when the last box is not closed, or is empty.
    """
    boxed = last_boxed(text)
    if boxed is None:
        return marked(text)
    return boxed


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`, with all braces inside; None when there is no box.

    Raises: RejectedRow when that box is not closed, or is empty.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None

    box = boxes[-1]
    inside = box["bare"]  # `\boxed 7`, without braces
    if inside is None:
        inside = braced(text[box.end() :])
    if inside is None:
        raise RejectedRow("the last \\boxed{ is not closed")
    if not inside.strip():
        raise RejectedRow("the last \\boxed{} is empty")
    return inside.strip()


def marked(text: str) -> str | None:
    """Return what follows the last `####` on its line, without thousands separators: `1234` of `#### 1,234`."""
    if MARKER not in text:
        return None
    line = text.rpartition(MARKER)[2].strip().partition("\n")[0]
    return THOUSANDS.sub("", line.strip()) or None
