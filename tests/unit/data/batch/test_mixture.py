from collections import Counter
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from apollo_sft.data.batch import permutation
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.mixture import Mixture, Part, mixture, shares
from apollo_sft.data.batch.plan import PlanSpec, plan, samples_per_epoch, steps_per_epoch
from apollo_sft.errors import DataError
from tests.support.samples import random_samples, write_store

SIZES = (40, 13, 7)
NAMES = ("a", "b", "c")


def spec(takes: tuple[int, ...], sizes: tuple[int, ...] = SIZES, **changes: object) -> PlanSpec:
    values: dict[str, object] = {"batch_size": 8, "micro_batch_size": 3, "dp_size": 2, "seed": 1}
    return PlanSpec(**(values | {"mixture": Mixture(NAMES[: len(sizes)], sizes, takes)} | changes))


def epoch_ids(wanted: PlanSpec, epoch: int) -> list[int]:
    assert wanted.mixture is not None
    lengths = np.ones(sum(wanted.mixture.sizes), dtype=np.int32)
    steps = steps_per_epoch(len(lengths), wanted)
    return list(chain.from_iterable(plan(lengths, wanted, epoch * steps + i).samples.tolist() for i in range(steps)))


def source(sample: int, sizes: tuple[int, ...] = SIZES) -> int:
    return next(number for number in range(len(sizes)) if sample < sum(sizes[: number + 1]))


def test_shares_are_those_of_the_largest_remainder() -> None:
    """Each share is its exact one rounded down or up, up where the remainder is larger, and all add up."""
    for seed in range(500):
        _check_shares(seed)


def _check_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [round(float(weight), 3) for weight in rng.lognormal(0, 2, rng.integers(1, 9)) + 0.001]
    total = int(rng.integers(0, 10 ** rng.integers(1, 10)))
    found = shares(weights, total)
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    assert sum(found) == total
    ups = [quota - int(quota) for quota, share in zip(quotas, found, strict=True) if share == int(quota) + 1]
    downs = [quota - int(quota) for quota, share in zip(quotas, found, strict=True) if share == int(quota)]
    assert len(ups) + len(downs) == len(weights)
    assert not ups or not downs or min(ups) >= max(downs)


def test_decimals_are_taken_as_they_are_written() -> None:
    assert shares([0.1, 0.2, 0.7], 10) == [1, 2, 7]
    assert shares([1, 1, 1], 2) == [1, 1, 0], "the first comes first"
    assert shares([1e-05, 1e-05], 7) == [4, 3]
    assert shares([3], 5) == [5]


def test_an_epoch_takes_of_each_source_what_was_asked_for() -> None:
    """Weights divide what the weighted sources have together; max_samples is a number; without either it is all."""
    whole = mixture([Part("a"), Part("b", max_samples=5), Part("c")], SIZES, "key")
    assert (whole.takes, whole.num_samples, whole.is_plain) == ((40, 5, 7), 52, False)
    weighted = mixture([Part("a", weight=1), Part("b", weight=3), Part("c", max_samples=2)], SIZES, "key")
    assert weighted.takes == (13, 40, 2)
    assert mixture([Part("a"), Part("b", max_samples=13)], SIZES[:2], "key").is_plain
    for epoch in range(4):
        ids = epoch_ids(spec(weighted.takes), epoch)
        assert Counter(map(source, ids)) == {0: 13, 1: 40, 2: 2}
        assert samples_per_epoch(60, spec(weighted.takes)) == len(ids) == 55


@pytest.mark.parametrize("takes", [(13, 40, 2), (40, 5, 7), (1, 1, 1), (3, 100, 7)])
@pytest.mark.parametrize("large", [False, True])
def test_every_sample_of_a_source_is_taken_equally_often(
    takes: tuple[int, ...], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one, after any number of epochs."""
    if large:
        monkeypatch.setattr(permutation, "LARGEST_PERMUTATION", 0)
    counts = np.zeros(sum(SIZES), dtype=int)
    for epoch in range(12):
        np.add.at(counts, epoch_ids(spec(takes), epoch), 1)
        for number, take in enumerate(takes):
            mine = counts[[i for i in range(sum(SIZES)) if source(i) == number]]
            assert mine.max() - mine.min() <= 1, (epoch, number)
            assert mine.sum() == take * (epoch + 1)


def test_which_samples_are_left_out_or_repeated_changes_with_epoch_and_seed() -> None:
    epochs = [frozenset(i for i in epoch_ids(spec((10, 20, 7)), epoch) if i < 40) for epoch in range(4)]
    assert all(len(ids) == 10 for ids in epochs)
    assert frozenset.union(*epochs) == frozenset(range(40)), "four epochs of a quarter are all of it"
    other = frozenset(i for i in epoch_ids(spec((10, 20, 7), seed=2), 0) if i < 40)
    assert other != epochs[0]
    repeated = [Counter(i for i in epoch_ids(spec((10, 20, 7)), epoch) if 40 <= i < 53) for epoch in range(2)]
    assert [sorted(found.values()) for found in repeated] == [[1] * 6 + [2] * 7] * 2
    assert {i for i, n in repeated[0].items() if n == 2} != {i for i, n in repeated[1].items() if n == 2}
    orders = [[i for i in epoch_ids(spec((80, 13, 7)), 0) if i < 40][:40] for _ in range(2)]
    assert orders[0] == orders[1] != sorted(orders[0])


@pytest.mark.parametrize("large", [False, True])
def test_names_alone_change_nothing(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(permutation, "LARGEST_PERMUTATION", 0)
    for epoch in range(3):
        assert epoch_ids(spec(SIZES), epoch) == epoch_ids_without(sum(SIZES), epoch)


def epoch_ids_without(num_samples: int, epoch: int) -> list[int]:
    wanted = spec(SIZES, mixture=None)
    steps = steps_per_epoch(num_samples, wanted)
    lengths = np.ones(num_samples, dtype=np.int32)
    return [int(i) for step in range(steps) for i in plan(lengths, wanted, epoch * steps + step).samples]


def test_sources_are_spread_over_the_epoch() -> None:
    """As evenly as chance: in each tenth of an epoch there is about a tenth of each source."""
    sizes, takes = (20_000, 2_000), (11_000, 11_000)
    parts = np.array_split(np.array(epoch_ids(spec(takes, sizes, batch_size=1000), 1)), 10)
    firsts = [int((part < sizes[0]).sum()) for part in parts]
    assert sum(firsts) == takes[0]
    assert max(abs(count - 1100) for count in firsts) < 6 * (2200 * 0.25) ** 0.5


def test_any_layout_has_the_same_steps() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, sum(SIZES)).astype(np.int32)
    for step in range(20):
        reference = plan(lengths, spec((13, 40, 2), dp_size=1), step).samples.tolist()
        for changes in ({"dp_size": 3}, {"dp_size": 4, "balance": True}, {"dp_size": 2, "max_tokens": 60}):
            laid_out = plan(lengths, spec((13, 40, 2), **changes), step)
            flat = [i for rank in range(laid_out.dp_size) for ids in laid_out.micro_batches(rank) for i in ids.tolist()]
            assert laid_out.samples.tolist() == reference
            assert sorted(flat) == sorted(reference)


def test_an_epoch_far_off_needs_no_list() -> None:
    """Of 10^10 samples, at step 10^9: nothing may be as long as the epoch."""
    sizes = (9 * 10**9, 10**9)
    mixed = Mixture(NAMES[:2], sizes, (5 * 10**9, 5 * 10**9))
    places = np.arange(10**9, 10**9 + 64) * 9
    found = mixed.samples(places, seed=1, epoch=10**6)
    assert len(set(found.tolist())) == 64
    assert 0 <= found.min() <= found.max() < 10**10
    assert mixed.source_of(found).tolist() == (places >= 5 * 10**9).astype(int).tolist()


@pytest.mark.parametrize(
    ("part", "size", "words"),
    [
        (
            Part("b", max_samples=14),
            13,
            ("source b has fewer samples", "13 samples, max_samples 14", "a weight repeats"),
        ),
        (Part("b"), 0, ("source b has no sample",)),
        (Part("b", weight=1e-9), 13, ("weight of the source b is too small for one sample",)),
    ],
)
def test_what_cannot_be_is_refused_by_name(part: Part, size: int, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as refused:
        mixture([Part("a", weight=1), part], [40, size], "data.train_files")
    assert "data.train_files" in str(refused.value)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_batch_knows_the_targets_of_each_source_and_the_source_of_each_document(tmp_path: Path, dp_size: int) -> None:
    samples = random_samples(sum(SIZES))
    store = write_store(tmp_path / "store", samples)
    loaders = [Loader(store, spec((13, 40, 2), dp_size=dp_size), rank, multiple=4) for rank in range(dp_size)]
    for step in range(4):
        batches = [loader.batch(step) for loader in loaders]
        planned = plan(store.lengths, loaders[0].spec, step)
        expected = Counter(dict.fromkeys(NAMES, 0))
        for i in planned.samples.tolist():
            expected[NAMES[source(i)]] += samples[i].num_targets
        assert all(batch.sources == dict(expected) for batch in batches)
        assert sum(batches[0].sources.values()) == batches[0].num_targets
        for rank, batch in enumerate(batches):
            for ids, micro_batch in zip(planned.micro_batches(rank), batch.micro_batches, strict=True):
                assert micro_batch.sources is not None
                assert micro_batch.sources.tolist() == [source(i) for i in ids.tolist()]


def test_one_source_is_told_apart_from_nothing(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(13))
    for mixed in (None, Mixture(("only",), (13,), (5,))):
        batch = Loader(store, spec((5,), (13,), mixture=mixed), 0).batch(0)
        assert batch.sources == {}
        assert all(micro_batch.sources is None for micro_batch in batch.micro_batches)
