from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from apollo_sft.data.batch import permutation as planning
from apollo_sft.data.batch.plan import PlanSpec, attention_cost, plan, steps_per_epoch


def spec(**changes: object) -> PlanSpec:
    values: dict[str, object] = {"batch_size": 8, "micro_batch_size": 3, "dp_size": 2, "seed": 1}
    return PlanSpec(**(values | changes))


def epoch_ids(num_samples: int, wanted: PlanSpec, epoch: int) -> list[list[int]]:
    steps = steps_per_epoch(num_samples, wanted)
    lengths = np.ones(num_samples, dtype=np.int32)
    return [plan(lengths, wanted, epoch * steps + i).samples.tolist() for i in range(steps)]


@pytest.mark.parametrize("num_samples", [1, 7, 8, 9, 63])
def test_every_sample_is_trained_once_an_epoch_and_the_tail_is_a_smaller_step(num_samples: int) -> None:
    for epoch in range(3):
        steps = epoch_ids(num_samples, spec(), epoch)
        assert sorted(chain.from_iterable(steps)) == list(range(num_samples))
        assert [len(step) for step in steps[:-1]] == [8] * (len(steps) - 1)
        assert len(steps[-1]) == (num_samples - 1) % 8 + 1


def test_drop_last_drops_only_the_partial_step() -> None:
    steps = epoch_ids(63, spec(drop_last=True), 0)
    assert [len(step) for step in steps] == [8] * 7
    assert steps_per_epoch(7, spec(drop_last=True)) == 0


def test_epochs_differ_and_are_repeatable() -> None:
    assert epoch_ids(64, spec(), 0) != epoch_ids(64, spec(), 1)
    assert epoch_ids(64, spec(), 1) == epoch_ids(64, spec(), 1)
    assert epoch_ids(64, spec(), 0) != epoch_ids(64, spec(seed=2), 0)
    assert list(chain.from_iterable(epoch_ids(10, spec(shuffle=False), 3))) == list(range(10))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_the_layout_moves_samples_but_never_changes_the_step(dp_size: int, micro_batch_size: int) -> None:
    lengths = np.ones(21, dtype=np.int32)
    for step in range(6):
        reference = plan(lengths, spec(dp_size=1), step)
        laid_out = plan(lengths, spec(dp_size=dp_size, micro_batch_size=micro_batch_size), step)
        assert laid_out.samples.tolist() == reference.samples.tolist()
        ranks = [laid_out.micro_batches(rank) for rank in range(dp_size)]
        flat = [i for rank in ranks for ids in rank for i in ids.tolist()]
        assert sorted(flat) == sorted(reference.samples.tolist())
        assert len({len(rank) for rank in ranks}) == 1, "every rank runs the same number of forwards"
        assert all(len(ids) <= micro_batch_size for rank in ranks for ids in rank)
        counts = [sum(map(len, rank)) for rank in ranks]
        assert max(counts) - min(counts) <= 1


LENGTHS = np.random.default_rng(0).integers(1, 900, 301).astype(np.int32)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [1, 300, 1000, 100_000])
@pytest.mark.parametrize("balance", [False, True])
def test_token_caps_and_balance_keep_every_sample_of_the_step(dp_size: int, max_tokens: int, balance: bool) -> None:
    wanted = spec(batch_size=64, dp_size=dp_size, max_tokens=max_tokens, balance=balance, attention_cost=1e-3)
    for step in range(steps_per_epoch(len(LENGTHS), wanted)):
        laid_out = plan(LENGTHS, wanted, step)
        reference = plan(LENGTHS, spec(batch_size=64, dp_size=1), step)
        assert laid_out.samples.tolist() == reference.samples.tolist()
        ranks = [laid_out.micro_batches(rank) for rank in range(dp_size)]
        forwards = [ids for rank in ranks for ids in rank]
        assert sorted(chain.from_iterable(ids.tolist() for ids in forwards)) == sorted(reference.samples.tolist())
        assert len({len(rank) for rank in ranks}) == 1
        for ids in forwards:
            assert LENGTHS[ids].sum() <= max_tokens or len(ids) == 1


def test_best_fit_fills_forwards() -> None:
    laid_out = plan(LENGTHS, spec(batch_size=301, dp_size=1, max_tokens=2000), 0)
    filled = [LENGTHS[ids].sum() for ids in laid_out.micro_batches(0)]
    assert sum(filled) / (2000 * len(filled)) > 0.97


def test_balance_makes_the_costs_of_the_ranks_nearly_equal() -> None:
    cost = attention_cost(1024)
    for balance, most in ((True, 1.02), (False, None)):
        laid_out = plan(LENGTHS, spec(batch_size=256, dp_size=8, balance=balance, attention_cost=cost), 0)
        shares = [np.concatenate(laid_out.micro_batches(rank)) for rank in range(8)]
        costs = np.array([(LENGTHS[ids] + cost * LENGTHS[ids].astype(float) ** 2).sum() for ids in shares])
        imbalance = costs.max() / costs.mean()
        assert laid_out.imbalance() == pytest.approx(imbalance)
        assert imbalance <= most if most else imbalance > 1.05


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 64, 65, 1000])
def test_a_large_epoch_is_a_permutation_that_is_computed_place_by_place(
    monkeypatch: pytest.MonkeyPatch, num_samples: int
) -> None:
    monkeypatch.setattr(planning, "LARGEST_PERMUTATION", 0)
    for epoch in range(3):
        assert sorted(chain.from_iterable(epoch_ids(num_samples, spec(), epoch))) == list(range(num_samples))
    if num_samples > 5:
        assert epoch_ids(num_samples, spec(), 0) != epoch_ids(num_samples, spec(), 1)
        assert epoch_ids(num_samples, spec(), 0) != epoch_ids(num_samples, spec(seed=2), 0)


def test_a_large_epoch_is_shuffled_as_evenly_as_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many seeds: which sample stands at each place, and which one follows the first."""
    monkeypatch.setattr(planning, "LARGEST_PERMUTATION", 0)
    num_samples, seeds = 24, 4000
    everything = spec(batch_size=num_samples)
    lengths = np.ones(num_samples, dtype=np.int32)
    orders = np.array([plan(lengths, replace(everything, seed=seed), 0).samples for seed in range(seeds)])
    firsts = [np.bincount(orders[:, place], minlength=num_samples) for place in range(num_samples)]
    following = np.bincount((orders[:, 1] - orders[:, 0]) % num_samples, minlength=num_samples)[1:]
    for counts in (*firsts, following):
        expected = seeds / len(counts)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 60, "22 or 23 degrees of freedom: above 60 once in 30,000 times"
