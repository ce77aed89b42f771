"""Curves: every point is where it belongs, spikes and validations stay, values are readable."""

import re
from xml.etree import ElementTree

import pytest

from apollo_sft.report.curves import (
    HEIGHT,
    MOST_POINTS,
    SMOOTHED_FROM,
    UNITS,
    Scale,
    number,
    smoothed,
    svg,
    thinned,
    ticks,
    value_scale,
)
from apollo_sft.report.document import Curve, Plot

EVIL = "<b>&\"'"


def line(text: str, kind: str) -> list[tuple[float, float]]:
    [path] = re.findall(rf'<path class="{kind}" d="M([^"]+)"', text)
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path.split("L"))]


def test_points_lie_where_their_values_say() -> None:
    text = svg(Plot("Loss", [Curve("training", [(0, 0.0), (5, 1.0), (10, 2.0)], 0)]))
    top = 2.0 * 1.06
    expected = [(0, UNITS), (UNITS / 2, UNITS * (1 - 1 / top)), (UNITS, UNITS * (1 - 2 / top))]
    assert line(text, "c0") == [pytest.approx(point, abs=0.1) for point in expected]


def test_the_pointer_reads_every_curve_and_the_last_validation() -> None:
    train = Curve(EVIL, [(step, 1.0 / step) for step in range(1, 21)], 0)
    text = svg(Plot("Loss", [train, Curve("validation", [(5, 0.25), (20, 0.06)], 1, sparse=True)]))
    tree = ElementTree.fromstring(re.sub(r"<figcaption>.*?</figcaption>", "", text))
    said = {}
    for group in tree.iter("g"):
        first, *rest = [label.text for label in group.iter("text")]
        said[first] = rest
    assert said["step 1"] == [f"{EVIL} 1"]
    assert said["step 5"] == [f"{EVIL} 0.2", "validation 0.25"]
    assert said["step 7"] == [f"{EVIL} 0.1429", "validation 0.25 (step 5)"]
    assert len(said) == 20
    for rect in tree.iter("rect"):
        assert float(rect.attrib["width"].rstrip("%")) > 0 and float(rect.attrib["height"]) == HEIGHT


def test_a_spike_in_a_long_curve_stays_and_a_mean_is_drawn() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[70_001] = (70_001, 9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert (70_001, 9.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    text = svg(Plot("Loss", [Curve("training", points, 0)]))
    assert min(y for _, y in line(text, "c0 faint")) < 100 < min(y for _, y in line(text, "c0"))
    assert len(text) < 200_000


def test_the_moving_mean_keeps_a_constant_and_a_slope() -> None:
    points = [(step, 3.0 * step) for step in range(SMOOTHED_FROM * 4)]
    middle = slice(20, -20)
    assert smoothed(points)[middle] == [pytest.approx(point) for point in points[middle]]


@pytest.mark.parametrize(
    ("values", "may_be_log", "expected"),
    [
        ([1.0, 2.0], True, Scale(0.92, 2.08)),
        ([0.1, 2.0], False, Scale(0.0, 2.12)),
        ([0.001, 10.0], True, Scale(-3.16, 1.16, log=True)),
        ([0.0, 10.0], True, Scale(0.0, 10.6)),
        ([5.0, 5.0], False, Scale(4.5, 5.5)),
        ([0.0, 0.0], False, Scale(-1.0, 1.0)),
    ],
)
def test_axes_hold_all_values(values: list[float], may_be_log: bool, expected: Scale) -> None:
    scale = value_scale(Plot("x", [], may_be_log=may_be_log), values)
    assert (scale.low, scale.high, scale.log) == (
        pytest.approx(expected.low),
        pytest.approx(expected.high),
        expected.log,
    )
    assert all(0 <= scale.share(value) <= 1 for value in values)
    assert len(ticks(scale)) >= 2


def test_ticks_are_round() -> None:
    assert ticks(Scale(0.0, 2.12)) == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert ticks(Scale(1, 3), 4, whole=True) == [1, 2, 3]
    assert ticks(Scale(-3.16, 1.16, log=True)) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.04213, "0.04213"), (2e-5, "2e-5"), (12345.6, "12.35k"), (3.2e7, "32M"), (-0.5, "-0.5")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_nothing_to_draw_is_said() -> None:
    assert "Nothing was measured" in svg(Plot("Loss", [Curve("training", [], 0)]))
