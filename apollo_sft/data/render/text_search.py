"""Find tokens at the ends of texts, and where two texts part."""

from __future__ import annotations


def tokens_at_start(text: str, tokens: tuple[str, ...]) -> list[str]:
    """Return the tokens that `text` starts with, white space between them. `tokens`: longest first."""
    found: list[str] = []
    rest = text.lstrip()
    token = first_token(rest, tokens)
    while token is not None:
        found.append(token)
        rest = rest.removeprefix(token).lstrip()
        token = first_token(rest, tokens)
    return found


def first_token(text: str, tokens: tuple[str, ...]) -> str | None:
    """Return the token that `text` starts with, the longest first; None where it starts with none."""
    if not text.startswith(tokens):
        return None
    return next(token for token in tokens if text.startswith(token))


def last_token(text: str, tokens: tuple[str, ...]) -> str | None:
    """Return the token that `text` ends with, the longest first; None where it ends with none."""
    if not text.endswith(tokens):
        return None
    return next(token for token in tokens if text.endswith(token))


def before_cut_token(texts: tuple[str, str], end: int, tokens: tuple[str, ...]) -> int:
    """Return `end`, moved to the start of a token that it would cut in one of the texts."""
    earliest = end
    for token in tokens:
        reach = len(token) - 1
        low = max(end - reach, 0)
        for text in texts:
            at = text[low : end + reach].find(token)
            if at >= 0:
                earliest = min(earliest, low + at)
    return earliest


def common_length(a: str, b: str) -> int:
    """Return the length of the common prefix, by bisection: slices compare much faster than characters."""
    low = 0
    high = min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
