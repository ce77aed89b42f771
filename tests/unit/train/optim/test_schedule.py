import math

import pytest

from apollo_sft.train.optim.build import Schedule, warmup_steps


def cosine(total: int = 100, warmup: int = 10, **changes: object) -> Schedule:
    values: dict[str, object] = {"kind": "cosine", "peak": 2.0, "min_ratio": 0.0, "stable_ratio": 0.9}
    return Schedule(total_steps=total, warmup_steps=warmup, **(values | changes))


def test_warm_up_is_linear_and_never_zero() -> None:
    rates = [cosine().rate(step) for step in range(10)]
    assert rates == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])


def test_cosine_follows_the_closed_form_and_reaches_the_end_value_after_the_last_step() -> None:
    schedule = cosine(min_ratio=0.1)
    for step in range(10, 100):
        shape = 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert schedule.rate(step) == pytest.approx(2.0 * (0.1 + 0.9 * shape))
    assert schedule.rate(100) == pytest.approx(0.2)
    assert schedule.rate(99) > 0.2


def test_wsd_is_stable_for_its_share_and_then_falls() -> None:
    schedule = cosine(kind="wsd", warmup=0, total=100, stable_ratio=0.8)
    assert [schedule.rate(step) for step in range(81)] == [2.0] * 81
    assert schedule.rate(90) == pytest.approx(1.0)
    assert schedule.rate(100) == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_every_step_of_the_shortest_runs_has_a_rate_above_zero(kind: str, total: int, warmup: int) -> None:
    schedule = cosine(kind=kind, total=total, warmup=min(total, warmup))
    assert all(0 < schedule.rate(step) <= 2.0 for step in range(total))


def test_warm_up_comes_from_steps_or_ratio() -> None:
    assert warmup_steps(1000, -1, 0.1) == 100
    assert warmup_steps(1000, 0, 0.1) == 0
    assert warmup_steps(1000, 40, 0.1) == 40
    assert warmup_steps(30, 40, 0.1) == 30
    assert warmup_steps(9, -1, 0.1) == 0
