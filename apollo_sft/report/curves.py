"""Curves as inline SVG: any width without a script, texts of one size, values under the pointer by CSS alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from apollo_sft.redact import redact
from apollo_sft.report.document import Curve, Plot

HEIGHT = 220
"""Pixels; the width is that of the page. Lines are drawn in a square of UNITS that is stretched to it."""
UNITS = 1000
MOST_POINTS = 500
"""Of a line. Of more, the lowest and the highest of each stretch are drawn, so that no spike is lost."""
MOST_READINGS = 120
"""Places along a plot that show their values."""
SMOOTHED_FROM = 60
"""Points from which on a moving mean is drawn over a curve of every step."""
WINDOWS = 40
"""A moving mean is over one part of so many."""
LOG_RATIO = 50
COLOURS = 6
LINE_HEIGHT = 15


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to shares of the axis. `low`, `high`: in log10 where `log`."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return (value - self.low) / (self.high - self.low)


def svg(plot: Plot) -> str:
    """The whole figure; a note where there is nothing to draw."""
    curves = [curve for curve in plot.curves if curve.points]
    if not curves:
        return '<p class="foot">Nothing was measured.</p>'
    steps = [step for curve in curves for step, _ in curve.points]
    across = Scale(min(steps), max(max(steps), min(steps) + 1))
    up = value_scale(plot, [value for curve in curves for _, value in curve.points])
    lines = "".join(_lines(curve, across, up, plot.noisy) for curve in curves)
    parts = [
        _grid(across, up),
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{lines}</svg>',
        *(_dots(curve, across, up) for curve in curves if curve.sparse),
        *_readings(curves, across, up),
    ]
    label = "; ".join(_in_words(curve) for curve in curves)
    body = f'<svg height="{HEIGHT}" role="img" aria-label="{_text(f"{plot.title}: {label}")}">{"".join(parts)}</svg>'
    logarithmic = " · logarithmic" if up.log else ""
    unit = f"<span>{_text(plot.unit)}{logarithmic}</span>" if plot.unit or up.log else ""
    legend = "".join(_key(curve) for curve in curves) if len(curves) > 1 else ""
    head = f'<figcaption><b>{_text(plot.title)}</b>{unit}<span class="keys">{legend}</span></figcaption>'
    return f'<figure>{head}<div class="plot">{body}</div></figure>'


def value_scale(plot: Plot, values: Sequence[float]) -> Scale:
    """The axis that holds all values, with a little room, and begins at 0 where that costs little."""
    low, high = min(values), max(values)
    if plot.may_be_log and low > 0 and high / low > LOG_RATIO:
        room = 0.04 * math.log10(high / low)
        return Scale(math.log10(low) - room, math.log10(high) + room, log=True)
    if plot.from_zero or 0 <= low < 0.4 * high:
        return Scale(0.0, high * 1.06 if high > 0 else 1.0)
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room)


def ticks(scale: Scale, wanted: int = 5, whole: bool = False) -> list[float]:
    """Round values inside the axis, `wanted` or a few less. `whole`: no fractions."""
    if scale.log:
        powers = range(math.ceil(scale.low), math.floor(scale.high) + 1)
        every = max(1, -(-len(powers) // wanted))
        found = [10.0**power for power in powers][::every]
        return found if len(found) > 1 else [10**scale.low, 10**scale.high]
    rough = (scale.high - scale.low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.ceil(scale.low / step - 1e-9)
    return [index * step for index in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short, of four figures at most: 0.0421, 1.8, 12.3k, 2e-5."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.4g}"


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each point and its neighbours."""
    half = max(len(points) // WINDOWS // 2, 2)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for index, (step, _) in enumerate(points):
        first, end = max(index - half, 0), min(index + half + 1, len(points))
        found.append((step, (sums[end] - sums[first]) / (end - first)))
    return found


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Of each stretch the lowest and the highest, in their order; both ends stay."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) * 2 // most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def _lines(curve: Curve, across: Scale, up: Scale, noisy: bool) -> str:
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
    x, y = 100 * across.share(point[0]), HEIGHT * (1 - up.share(point[1]))
    return f'<circle class="c{curve.colour % COLOURS}" cx="{x:.2f}%" cy="{y:.1f}" r="3"/>'


def _grid(across: Scale, up: Scale) -> str:
    parts = []
    for value in ticks(up):
        y = HEIGHT * (1 - up.share(value))
        parts.append(f'<line x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="ends" x="-8" y="{y + 4:.1f}">{number(value)}</text>')
    for value in ticks(across, 6, whole=True):
        share = across.share(value)
        side = "begins" if share < 0.04 else "ends" if share > 0.96 else "middle"
        parts.append(f'<text class="{side}" x="{100 * share:.2f}%" y="{HEIGHT + 18}">{number(value)}</text>')
    return "".join(parts)


def _readings(curves: Sequence[Curve], across: Scale, up: Scale) -> list[str]:
    """Strips along the plot; the one under the pointer shows its step and what each curve is there."""
    steps = _read_steps(curves)
    middles = [(first + second) / 2 for first, second in pairwise(steps)]
    edges = [across.low, *middles, across.high]
    found = []
    for index, step in enumerate(steps):
        left, right = 100 * across.share(edges[index]), 100 * across.share(edges[index + 1])
        x = 100 * across.share(step)
        marks, words = [f'<line x1="{x:.2f}%" x2="{x:.2f}%" y2="{HEIGHT}"/>'], [f"step {step:,}"]
        for curve in curves:
            point = next((point for point in reversed(curve.points) if point[0] <= step), None)
            if point is not None and (point[0] == step or curve.sparse):
                marks.append(_dot(curve, point, across, up))
                at = f" (step {point[0]:,})" if point[0] != step else ""
                words.append(f"{curve.name} {number(point[1])}{at}")
        strip = f'<rect x="{left:.2f}%" width="{max(right - left, 0.1):.2f}%" height="{HEIGHT}"/>'
        found.append(f'<g class="at">{strip}{"".join(marks)}{_said(words, x)}</g>')
    return found


def _said(words: Sequence[str], x: float) -> str:
    """On the side of the plot where the pointer is not."""
    side, place = ("ends", "100%") if x < 50 else ("begins", "8")
    lines = enumerate(words, start=1)
    return "".join(f'<text class="{side}" x="{place}" y="{LINE_HEIGHT * n}">{_text(word)}</text>' for n, word in lines)


def _read_steps(curves: Sequence[Curve]) -> list[int]:
    """All of the few points of sparse curves, both ends, and what is spread evenly between."""
    every = sorted({step for curve in curves for step, _ in curve.points})
    few = {step for curve in curves if curve.sparse for step, _ in curve.points}
    few = few if len(few) <= MOST_READINGS // 2 else set()
    spread = every[:: max(1, -(-len(every) // (MOST_READINGS - len(few))))]
    return sorted({*spread, *few, every[-1]})


def _key(curve: Curve) -> str:
    kind = f"c{curve.colour % COLOURS}{' sparse' if curve.sparse else ''}"
    line = f'<svg class="key" viewBox="0 0 22 8"><path class="{kind}" d="M1 4L21 4"/></svg>'
    return f'<span class="key">{line}{_text(curve.name)}</span>'


def _in_words(curve: Curve) -> str:
    (first, start), (last, end) = curve.points[0], curve.points[-1]
    return f"{curve.name}, {number(start)} at step {first:,}, {number(end)} at step {last:,}"


def _text(text: str) -> str:
    return escape(redact(text))
