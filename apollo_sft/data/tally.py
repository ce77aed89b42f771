"""Count something that was found in rows, and name the first of these rows."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_EXAMPLES = 5


@dataclass(slots=True)
class Tally:
    """A count, and where the first few of what is counted were found."""

    count: int = 0

    examples: list[str] = field(default_factory=list)
    """At most `MAX_EXAMPLES`, in the order in which they were found."""

    def add(self, example: str, count: int = 1) -> None:
        """Count `count` more, found in `example`."""
        self.count += count
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)

    def merge(self, later: Tally) -> None:
        """Add what was counted in later rows. The examples are still the first ones."""
        self.count += later.count
        self.examples += later.examples[: MAX_EXAMPLES - len(self.examples)]
