"""Count what is remarkable about rendered turns, by the names of `audit.FINDINGS`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

from apollo_sft.data.render.replies import missing_parts
from apollo_sft.data.render.spans import Text
from apollo_sft.data.render.tokens import TokenSpans
from apollo_sft.data.tally import Tally
from apollo_sft.types import Conversation, RowRef


@dataclass(slots=True)
class RenderCounts:
    """Counts over all rows that were rendered so far."""

    turns: int = 0
    """Trained turns."""

    findings: dict[str, Tally] = field(default_factory=dict)
    """What was found, by the names of `audit.FINDINGS`."""

    stop_tokens: Counter[int] = field(default_factory=Counter)
    """Token id -> turns that end with it."""

    def add(self, name: str, ref: RowRef, count: int = 1) -> None:
        """Count a finding in a row. Nothing is counted for a `count` of 0."""
        if not count:
            return

        tally = self.findings.setdefault(name, Tally())
        example = str(ref)
        if example in tally.examples:  # a row with several of them is named once
            tally.count += count
        else:
            tally.add(example, count)

    def add_sample(self, conversation: Conversation, text: Text, tokens: TokenSpans) -> dict[int, tuple[str, ...]]:
        """Count the turns of one sample.

        Returns the parts that the template does not write, for each turn that lacks some.
        """
        self.add("cut_turns", conversation.ref, tokens.num_cuts)
        unwritten: dict[int, tuple[str, ...]] = {}
        pairs = zip(text.spans, tokens.ranges, strict=True)
        for turn, group in groupby(pairs, key=lambda pair: pair[0].turn):
            spans, ranges = zip(*group, strict=True)
            message = conversation.messages[turn]
            missing = missing_parts(message, text.text[spans[0].reply_start : spans[-1].end])
            if missing:
                unwritten[turn] = missing

            self.turns += int(ranges[0][0] < ranges[-1][1])
            if spans[-1].stop is not None:
                self.stop_tokens[int(tokens.ids[ranges[-1][1] - 1])] += 1
            found = {
                "unpredictable_targets": ranges[0][0] == 0 < ranges[0][1],
                "turns_without_stop": spans[-1].stop is None,
                "second_stops": spans[-1].second_stop,
                "unopened_turns": spans[0].lacks_prefill,
                "rewritten_turns": spans[0].rewritten,
                "clipped_marks": any(span.clipped for span in spans),
                "unwritten_turns": bool(missing),
                "trained_headers": spans[0].has_header,
                "empty_replies": "tool_calls" not in message and not message["content"].strip(),
            }
            # Nearly always nothing was found: one test instead of many calls.
            if True in found.values():
                for name, is_found in found.items():
                    self.add(name, conversation.ref, int(is_found))
        return unwritten
