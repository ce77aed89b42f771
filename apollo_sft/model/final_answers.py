"""The marks of final answers in text, for the code that writes data and the code that scores replies. No torch here."""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{}$\\]+))")
"""`\\boxed{…}`, `\\fbox{…}`, and TeX's form without braces: `\\boxed 7`."""
MARKER = "####"
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
"""The separators of thousands in a number."""


def braced(text: str) -> str | None:
    """Return `text` up to the brace that closes the one before it, or None. `\\{` and `\\}` are part of the answer."""
    depth = 1
    escaped = False
    for position, char in enumerate(text):
        if not escaped:
            depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return text[:position]
        escaped = char == "\\" and not escaped
    return None
