"""Every batch has m different slices of each partition; every slice comes; seed and step decide which."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.methods.global_contrast import partition
from medssl.platform.errors import UsageError
from medssl.platform.partitions import indices


def slices(lengths, seed=0):
    """Volume and position of the slices of volumes of these lengths, in any order, volumes with any numbers."""
    volume = np.repeat(7 * np.arange(len(lengths)) + 3, lengths)
    position = np.concatenate([np.arange(n, dtype=np.float32) / max(n - 1, 1) for n in lengths])
    mixed = np.random.default_rng(seed).permutation(len(volume))
    return volume[mixed], position[mixed]


def batches(lengths, steps, **choice):
    return list(itertools.islice(indices(*slices(lengths), **choice), steps))


def parts(position, count):
    return partition(torch.as_tensor(position), count).numpy()


@st.composite
def plans(draw):
    """Volumes of random lengths, short ones among them, and an (m, S) that they can fill."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    count = draw(st.integers(1, 6))
    held = np.bincount(parts(slices(lengths)[1], count), minlength=count)
    most = int(held.min())  # of few volumes one may give several slices of a partition
    if most == 0:
        lengths, most = [*lengths, count], 1  # a volume of S slices has one in each partition
    return lengths, draw(st.integers(1, most)), count, draw(st.integers(0, 2**32))


@given(plans())
@settings(max_examples=200, deadline=None)
def test_no_slice_is_blank_or_repeated_and_every_partition_has_m(plan):
    lengths, m, count, seed = plan
    volume, position = slices(lengths)
    for rows in batches(lengths, 2 * len(lengths) + 1, volumes=m, partitions=count, seed=seed):
        assert rows.min() >= 0
        assert rows.max() < len(volume)
        assert len(set(rows.tolist())) == m * count
        assert parts(position[rows], count).reshape(m, count).tolist() == [list(range(count))] * m


@given(plans())
@settings(max_examples=50, deadline=None)
def test_every_slice_comes_within_as_many_epochs_as_the_fullest_cell_has_slices(plan):
    lengths, m, count, seed = plan
    epochs = max(lengths)  # no cell is fuller than its volume
    seen = np.concatenate(batches(lengths, epochs * -(-len(lengths) // m), volumes=m, partitions=count, seed=seed))
    assert set(seen.tolist()) == set(range(sum(lengths)))


@given(plans(), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_continuing_from_any_step_equals_not_stopping(plan, start):
    lengths, m, count, seed = plan
    choice = {"volumes": m, "partitions": count, "seed": seed}
    whole, rest = batches(lengths, start + 4, **choice)[start:], batches(lengths, 4, start=start, **choice)
    assert all(np.array_equal(a, b) for a, b in zip(whole, rest, strict=True))


@given(plans())
@settings(max_examples=50, deadline=None)
def test_volumes_with_every_partition_keep_their_places(plan):
    """Row i of a batch is one volume, unless it lacks a partition; and no volume comes twice as a row of its own."""
    lengths, m, count, seed = plan
    if min(lengths) < count:
        lengths = [n + count for n in lengths]
    volume, _ = slices(lengths)
    m = min(m, len(lengths))
    for rows in batches(lengths, 2 * len(lengths), volumes=m, partitions=count, seed=seed):
        own = volume[rows].reshape(m, count)
        assert (own == own[:, :1]).all()
        assert len(set(own[:, 0].tolist())) == m


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_joint_batch(world):
    choice = {"volumes": 4, "partitions": 3, "seed": 5}
    lengths = [9, 2, 7, 8, 1, 12, 5]
    shares = [batches(lengths, 6, rank=rank, world=world, **choice) for rank in range(world)]
    for step, joint in enumerate(batches(lengths, 6, **choice)):
        assert np.concatenate([own[step] for own in shares]).tolist() == joint.tolist()


def test_other_seeds_and_other_epochs_give_other_batches():
    first, again = (batches([10] * 6, 2, volumes=6, partitions=4, seed=seed) for seed in (0, 1))
    assert sorted(first[0].tolist()) != sorted(again[0].tolist())
    assert sorted(first[0].tolist()) != sorted(first[1].tolist())


def test_volumes_of_the_source_lose_no_slice():
    """ACDC, 10 slices in 4 partitions: the source never takes the ninth and the tenth."""
    seen = np.concatenate(batches([10] * 3, 12, volumes=3, partitions=4, seed=0))
    assert len(set(seen.tolist())) == 30


@pytest.mark.parametrize(
    ("lengths", "choice", "sentence"),
    [
        ([2, 2], {"volumes": 3, "partitions": 2}, "partition 1 of 2 holds 2 slices"),
        ([1, 1, 1], {"volumes": 2, "partitions": 3}, "partition 2 of 3 holds 0 slices"),
        ([5, 5, 5], {"volumes": 3, "partitions": 2, "world": 2}, "cannot be shared by 2 workers"),
    ],
)
def test_what_cannot_be_filled_is_refused(lengths, choice, sentence):
    with pytest.raises(UsageError, match=sentence):
        batches(lengths, 1, seed=0, **choice)
