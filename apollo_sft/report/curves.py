"""Curves as inline SVG: any width without a script, texts of one size, values under the pointer by CSS alone.

A figure has two nested coordinate systems. Lines are paths in a square of 1000 x 1000 that is stretched to the page;
texts, dots and grid lines are placed in percent of the width and in pixels of the height, so that they are not
stretched. A value of 2.0 on an axis from 1.0 to 5.0, for example, has the share 0.25: it is at y = 750 in a path, and
at 0.75 x 220 = 165 pixels as a dot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from apollo_sft.redact import redact
from apollo_sft.report.document import Curve, Plot

HEIGHT = 220
"""Height of a plot in pixels; the width is that of the page."""
UNITS = 1000
"""Side of the square in which lines are drawn."""
MOST_POINTS = 500
"""Number of points of a line. Of more, the lowest and the highest of each stretch are drawn: no spike is lost."""
MOST_READINGS = 120
"""Number of places along a plot that show their values."""
SMOOTHED_FROM = 60
"""Number of points from which on a moving mean is drawn over a curve of every step."""
WINDOWS = 40
"""A moving mean covers this fraction of a curve: one part in 40."""
LOG_RATIO = 50
"""Ratio of the largest to the smallest value from which on an axis may be logarithmic."""
COLOURS = 6
LINE_HEIGHT = 15


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis: from values to shares of its length."""

    low: float
    """The value at its start; the log10 of it where `log`."""
    high: float
    """The value at its end; the log10 of it where `log`."""
    log: bool = False

    def share(self, value: float) -> float:
        """Return the place of a value: 0 at the start of the axis, 1 at its end."""
        if self.log:
            value = math.log10(value)
        return (value - self.low) / (self.high - self.low)


def svg(plot: Plot) -> str:
    """Draw the whole figure; a note where there is nothing to draw."""
    curves = [curve for curve in plot.curves if curve.points]
    if not curves:
        return '<p class="foot">Nothing was measured.</p>'

    steps: list[int] = []
    values: list[float] = []
    for curve in curves:
        steps += [step for step, _ in curve.points]
        values += [value for _, value in curve.points]

    # A single step still needs an axis with a length.
    across = Scale(min(steps), max(max(steps), min(steps) + 1))
    up = value_scale(plot, values)

    # What comes later is drawn above what comes earlier: the strips for the pointer must be on top.
    lines = "".join(_lines(curve, across, up, plot.noisy) for curve in curves)
    parts = [
        _grid(across, up),
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{lines}</svg>',
        *(_dots(curve, across, up) for curve in curves if curve.sparse),
        *_readings(curves, across, up),
    ]
    label = "; ".join(_in_words(curve) for curve in curves)
    body = f'<svg height="{HEIGHT}" role="img" aria-label="{_text(f"{plot.title}: {label}")}">{"".join(parts)}</svg>'

    head = f"<b>{_text(plot.title)}</b>{_unit(plot, up)}"
    legend = ""
    if len(curves) > 1:
        legend = "".join(_key(curve) for curve in curves)

    head = f'<figcaption>{head}<span class="keys">{legend}</span></figcaption>'
    return f'<figure>{head}<div class="plot">{body}</div></figure>'


def _unit(plot: Plot, up: Scale) -> str:
    unit = _text(plot.unit)
    if up.log:
        unit += " · logarithmic"
    return f"<span>{unit}</span>" if unit else ""


def value_scale(plot: Plot, values: Sequence[float]) -> Scale:
    """Make an axis for all values, with a little room at its ends. It begins at 0 where that takes little room."""
    low = min(values)
    high = max(values)
    if plot.may_be_log and low > 0 and high / low > LOG_RATIO:
        room = 0.04 * math.log10(high / low)
        return Scale(math.log10(low) - room, math.log10(high) + room, log=True)

    if plot.from_zero or 0 <= low < 0.4 * high:
        end = high * 1.06
        return Scale(0.0, end if high > 0 else 1.0)

    # Equal values, or all of them 0, still need an axis with a length.
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room)


def ticks(scale: Scale, wanted: int = 5, whole: bool = False) -> list[float]:
    """Choose round values inside the axis, `wanted` or a few less. `whole`: integers only."""
    if scale.log:
        powers = range(math.ceil(scale.low), math.floor(scale.high) + 1)
        every = max(1, -(-len(powers) // wanted))
        found = [10.0**power for power in powers][::every]
        # An axis of less than two powers of ten is labelled at its ends.
        return found if len(found) > 1 else [10**scale.low, 10**scale.high]

    rough = (scale.high - scale.low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(step, 1.0)

    # The tolerance keeps a tick at the very end of the axis in spite of rounding.
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Format a number with four digits at most: 0.0421, 1.8, 12.3k, 2e-5."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.4g}"


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the mean of each point and its neighbours."""
    half = max(len(points) // WINDOWS // 2, 2)

    # The sum of a window is the difference of two running sums.
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)

    found = []
    for index, (step, _) in enumerate(points):
        first = max(index - half, 0)
        end = min(index + half + 1, len(points))
        found.append((step, (sums[end] - sums[first]) / (end - first)))

    return found


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Keep the lowest and the highest point of each stretch, in their order, and both ends."""
    if len(points) <= most:
        return list(points)

    size = -(-len(points) * 2 // most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def _lines(curve: Curve, across: Scale, up: Scale, noisy: bool) -> str:
    """Draw a curve; a noisy one faintly, with a moving mean over it."""
    kind = f"c{curve.colour % COLOURS}"
    if curve.sparse:
        return f'<path class="{kind} sparse" d="{_path(curve.points, across, up)}"/>'

    every = _path(thinned(curve.points), across, up)
    if not noisy or len(curve.points) < SMOOTHED_FROM:
        return f'<path class="{kind}" d="{every}"/>'

    mean = _path(thinned(smoothed(curve.points)), across, up)
    return f'<path class="{kind} faint" d="{every}"/><path class="{kind}" d="{mean}"/>'


def _path(points: Sequence[tuple[int, float]], across: Scale, up: Scale) -> str:
    places = (f"{UNITS * across.share(x):.1f} {UNITS * (1 - up.share(y)):.1f}" for x, y in points)
    return "M" + "L".join(places)


def _dots(curve: Curve, across: Scale, up: Scale) -> str:
    return "".join(_dot(curve, point, across, up) for point in thinned(curve.points, MOST_READINGS))


def _dot(curve: Curve, point: tuple[int, float], across: Scale, up: Scale) -> str:
    x = 100 * across.share(point[0])
    y = HEIGHT * (1 - up.share(point[1]))
    return f'<circle class="c{curve.colour % COLOURS}" cx="{x:.2f}%" cy="{y:.1f}" r="3"/>'


def _grid(across: Scale, up: Scale) -> str:
    """Draw the horizontal lines and the labels of both axes."""
    parts = []

    for value in ticks(up):
        y = HEIGHT * (1 - up.share(value))
        parts.append(f'<line x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="ends" x="-8" y="{y + 4:.1f}">{number(value)}</text>')

    for value in ticks(across, 6, whole=True):
        share = across.share(value)
        # A label at an end of the axis is aligned with it, so that it is not cut at the edge of the figure.
        side = "middle"
        if share < 0.04:
            side = "begins"
        elif share > 0.96:
            side = "ends"

        parts.append(f'<text class="{side}" x="{100 * share:.2f}%" y="{HEIGHT + 18}">{number(value)}</text>')

    return "".join(parts)


def _readings(curves: Sequence[Curve], across: Scale, up: Scale) -> list[str]:
    """Draw vertical strips along the plot; CSS shows the one under the pointer, with the values of its step."""
    steps = _read_steps(curves)
    middles = [(first + second) / 2 for first, second in pairwise(steps)]
    edges = [across.low, *middles, across.high]

    found = []
    for index, step in enumerate(steps):
        left = 100 * across.share(edges[index])
        right = 100 * across.share(edges[index + 1])
        x = 100 * across.share(step)
        marks = [f'<line x1="{x:.2f}%" x2="{x:.2f}%" y2="{HEIGHT}"/>']
        words = [f"step {step:,}"]

        # A sparse curve shows its last value before this step; the others show nothing between their points.
        for curve in curves:
            point = next((point for point in reversed(curve.points) if point[0] <= step), None)
            if point is None or (point[0] != step and not curve.sparse):
                continue

            marks.append(_dot(curve, point, across, up))
            reading = f"{curve.name} {number(point[1])}"
            if point[0] != step:
                reading += f" (step {point[0]:,})"

            words.append(reading)

        strip = f'<rect x="{left:.2f}%" width="{max(right - left, 0.1):.2f}%" height="{HEIGHT}"/>'
        found.append(f'<g class="at">{strip}{"".join(marks)}{_reading(words, x)}</g>')

    return found


def _reading(words: Sequence[str], x: float) -> str:
    """Write lines of text on the side of the plot where the pointer is not."""
    side = "begins"
    place = "8"
    if x < 50:
        side = "ends"
        place = "100%"

    lines = enumerate(words, start=1)
    return "".join(f'<text class="{side}" x="{place}" y="{LINE_HEIGHT * n}">{_text(word)}</text>' for n, word in lines)


def _read_steps(curves: Sequence[Curve]) -> list[int]:
    """Choose the steps that show their values: those of sparse curves if they are few, both ends, some between."""
    every: set[int] = set()
    few: set[int] = set()
    for curve in curves:
        steps = {step for step, _ in curve.points}
        every |= steps
        if curve.sparse:
            few |= steps

    if len(few) > MOST_READINGS // 2:
        few = set()

    ordered = sorted(every)
    spread = ordered[:: max(1, -(-len(ordered) // (MOST_READINGS - len(few))))]
    return sorted({*spread, *few, ordered[-1]})


def _key(curve: Curve) -> str:
    kind = f"c{curve.colour % COLOURS}"
    if curve.sparse:
        kind += " sparse"
    line = f'<svg class="key" viewBox="0 0 22 8"><path class="{kind}" d="M1 4L21 4"/></svg>'
    return f'<span class="key">{line}{_text(curve.name)}</span>'


def _in_words(curve: Curve) -> str:
    first, start = curve.points[0]
    last, end = curve.points[-1]
    return f"{curve.name}, {number(start)} at step {first:,}, {number(end)} at step {last:,}"


def _text(text: str) -> str:
    return escape(redact(text))
