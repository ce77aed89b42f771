from itertools import chain

import numpy as np
import pytest

from apollo_sft.data.plan import PlanSpec, plan, steps_per_epoch


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
        flat = [i for rank in laid_out.micro_batches for ids in rank for i in ids.tolist()]
        assert sorted(flat) == sorted(reference.samples.tolist())
        assert len({len(rank) for rank in laid_out.micro_batches}) == 1, "every rank runs the same number of forwards"
        assert all(len(ids) <= micro_batch_size for rank in laid_out.micro_batches for ids in rank)
        counts = [sum(map(len, rank)) for rank in laid_out.micro_batches]
        assert max(counts) - min(counts) <= 1
