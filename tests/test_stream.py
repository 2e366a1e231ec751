"""Every slice once per epoch, in an order fixed by seed and epoch, on one worker or several, stopped or not."""

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from medssl.methods.protocol import UNLABELLED, Batch
from medssl.platform import geometry, ingest, stream
from medssl.platform.errors import RunError, UsageError
from medssl.platform.store import Store, VolumeRecord
from medssl.platform.stream import Slices

SIZES = {"a1": (5, 7), "a2": (6, 4), "b1": (5, 7), "c1": (8, 8), "d1": (3, 9)}  # volume: rows, columns
DEPTH = {"a1": 7, "a2": 5, "b1": 9, "c1": 6, "d1": 10}  # slices; 37 in all
LABELLED = {"a1", "c1"}
COUNT = sum(DEPTH.values())

Drawn = dict[str, tuple[NDArray[Any], NDArray[np.uint8] | None]]  # volume: image (d, c, h, w), label (d, h, w)


def drawn(dtype: str) -> Drawn:
    """Random volumes; a label misses its last column in one of them."""
    rng = np.random.default_rng(0)
    volumes: Drawn = {}
    for name, (h, w) in SIZES.items():
        image = rng.integers(0, 200, (DEPTH[name], 2, h, w)).astype(dtype)
        label = rng.integers(0, 3, (DEPTH[name], h, w)).astype(np.uint8)
        label[..., -1] = UNLABELLED
        volumes[name] = (image, label if name in LABELLED else None)
    return volumes


def write(root: Path, volumes: Drawn, dtype: str, files: int) -> Store:
    """A store written by hand: rows shuffled over files of unequal length, the manifest by `Store.manifest`."""
    rows, records = [], []
    for name, (image, label) in volumes.items():
        d, c, h, w = image.shape
        spacing = (1.0, 0.5, float(d))
        for k in range(d):
            pixels = {"image": image[k].tobytes(), "label": None if label is None else label[k].tobytes()}
            place = {"patient": name[0], "volume": name, "slice_index": k, "position": k / (d - 1)}
            shape = {"height": h, "width": w, "channels": c, "spacing_mm": spacing, "foreground": None}
            rows.append(place | pixels | shape)
        known = (name, name[0], None, label is not None, d, h, w, c, spacing, None)
        records.append(VolumeRecord(*known, geometry=cast(Any, {}), digest=""))
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    (root / "slices").mkdir(parents=True)
    paths = [root / "slices" / f"part-{i:05}.parquet" for i in range(files)]
    cuts = [0, *sorted(np.random.default_rng(2).choice(range(1, len(rows)), files - 1, replace=False)), len(rows)]
    for path, (begin, end) in zip(paths, itertools.pairwise(cuts), strict=True):
        pq.write_table(pa.Table.from_pylist(rows[begin:end], ingest.schema()), path)
    preset = geometry.Preset(None, None, (1.0, 99.0), foreground_box=False, pad=0, dtype=cast(Any, dtype))
    about = ("test", ("background", "x", "y"), None, "", "", {}, preset, "hash", "source")
    store = Store(root, *about, files=tuple(paths), volumes=tuple(records))
    (root / "manifest.json").write_text(json.dumps(store.manifest()))
    return Store.open(root)


@pytest.fixture(scope="module")
def volumes() -> Drawn:
    return drawn("int16")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, volumes: Drawn) -> Store:
    return write(tmp_path_factory.mktemp("store"), volumes, "int16", files=5)


@pytest.fixture(scope="module")
def slices(store: Store) -> Slices:
    return Slices.read(store)


def first(batches: Iterator[Batch], steps: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in itertools.islice(batches, steps)]


# Slices in memory


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16"])
def test_what_was_written_is_read(tmp_path: Path, dtype: str) -> None:
    volumes = drawn(dtype)
    read = list(Slices.read(write(tmp_path, volumes, dtype, files=3)).volumes())
    assert [volume.volume for volume in read] == sorted(volumes)
    for volume in read:
        image, label = volumes[volume.volume]
        np.testing.assert_array_equal(volume.image.numpy(), image)
        assert volume.image.numpy().dtype == dtype
        assert volume.patient == volume.volume[0]
        assert volume.spacing_mm == (1.0, 0.5, float(len(image)))
        if label is None:
            assert volume.label is None
        else:
            assert volume.label is not None
            np.testing.assert_array_equal(volume.label.numpy(), label)


def test_a_batch_holds_the_pixels_of_its_slices_and_padding(slices: Slices, volumes: Drawn) -> None:
    batch = slices.take([30, 2, 2, 11])
    assert batch["image"].shape == (4, 2, 8, 9)  # the largest height and the largest width of the set
    for i, row in enumerate([30, 2, 2, 11]):
        name, k = slices.volume_names[slices.volume[row]], int(slices.slice_index[row])
        image, label = volumes[name]
        h, w = SIZES[name]
        expected, mask = np.zeros((2, 8, 9), "int16"), np.full((8, 9), UNLABELLED, np.uint8)
        expected[:, :h, :w] = image[k]
        if label is not None:
            mask[:h, :w] = label[k]
        np.testing.assert_array_equal(batch["image"][i].numpy(), expected)
        np.testing.assert_array_equal(batch["label"][i].numpy(), mask)
        assert batch["size"][i].tolist() == [h, w]
        assert batch["position"][i] == pytest.approx(k / (DEPTH[name] - 1))
        assert slices.patient_names[batch["patient"][i]] == name[0]
        assert batch["index"][i] == row


def test_patients_and_labels_choose_the_same_slices_while_reading_and_in_memory(store: Store, slices: Slices) -> None:
    for patients, labelled in [(None, True), (None, False), (["a", "d"], None), (["a", "d"], True), (["b"], False)]:
        for chosen in (Slices.read(store, patients, labelled), slices.select(patients, labelled)):
            names = {chosen.volume_names[number] for number in chosen.volume}
            assert names == {
                name for name in SIZES if (patients is None or name[0] in patients) and labelled in (None, name in LABELLED)
            }
            assert len(chosen) == sum(DEPTH[name] for name in names)
    assert slices.select() is slices  # all of it: not copied


def test_a_set_without_labels_spends_no_memory_on_them(store: Store) -> None:
    unlabelled = Slices.read(store, labelled=False)
    assert unlabelled.label is None
    assert (unlabelled.take([0, 1])["label"] == UNLABELLED).all()


def test_a_set_that_is_not_there_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match='no patient "z"'):
        Slices.read(store, ["a", "z"])
    with pytest.raises(RunError, match="no labelled volume of the 1 wanted patients"):
        Slices.read(store, ["b"], labelled=True)


def test_a_broken_file_is_named(tmp_path: Path, volumes: Drawn) -> None:
    store = write(tmp_path, volumes, "int16", files=2)
    whole = store.files[1].read_bytes()
    store.files[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"part-00001\.parquet: missing or broken"):
        Slices.read(store)


def test_one_copy_in_rays_object_store_serves_without_copying(ray_local: None, slices: Slices) -> None:
    import ray

    shared = ray.get(ray.put(slices.arrays()))
    assert not shared["image"].flags.writeable
    again = Slices.from_arrays(shared)
    assert again.image.data_ptr() == shared["image"].__array_interface__["data"][0]
    assert all(torch.equal(value, again.take([3, 1])[key]) for key, value in slices.take([3, 1]).items())
    assert again.nbytes == slices.nbytes
    assert (again.patient_names, again.volume_names) == (slices.patient_names, slices.volume_names)


def test_a_set_fits_in_all_of_the_memory_and_not_in_none(store: Store) -> None:
    assert stream.fits(store)
    assert not stream.fits(store, memory_fraction=0)


# Order


def test_the_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    orders = {(seed, epoch): stream.order(50, seed, epoch).tolist() for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert stream.order(50, 2, 1).tolist() == orders[2, 1]
    assert stream.order(6, 0, 0).tolist() == [0, 2, 1, 5, 4, 3]  # for ever: resumed runs rely on it


def test_every_permutation_is_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        order = tuple(stream.order(3, 5, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # χ² with 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("batch", "world"), [(8, 1), (8, 2), (6, 3), (60, 2)])
def test_workers_together_see_each_slice_once_per_epoch(slices: Slices, batch: int, world: int) -> None:
    """A batch of 60 is more than an epoch of 37."""
    steps = 5 * COUNT // batch + 1
    shares = [first(stream.node_batches(slices, batch, seed=3, rank=r, world=world), steps) for r in range(world)]
    stream_ = [index for step in zip(*shares, strict=True) for share in step for index in share]
    for epoch in range(5):
        assert stream_[epoch * COUNT : (epoch + 1) * COUNT] == stream.order(COUNT, 3, epoch).tolist()


def test_workers_see_the_joint_batch(slices: Slices) -> None:
    joint = first(stream.node_batches(slices, 8, seed=0), 12)
    halves = [first(stream.node_batches(slices, 8, seed=0, rank=rank, world=2), 12) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == joint


def test_continuing_takes_up_where_it_stopped(slices: Slices) -> None:
    whole = first(stream.node_batches(slices, 8, seed=0, rank=1, world=2), 20)
    for start in (1, 4, 5, 13):
        assert first(stream.node_batches(slices, 8, seed=0, start=start, rank=1, world=2), 20 - start) == whole[start:]


def test_a_batch_that_cannot_be_shared_is_refused(slices: Slices) -> None:
    with pytest.raises(UsageError, match="a batch of 8 slices cannot be shared by 3 workers"):
        next(stream.node_batches(slices, 8, seed=0, rank=0, world=3))


# Ray Data


def rows_of(counts: list[int], taken: int, **where: Any) -> list[tuple[int, int, int]]:
    """(epoch, file, place in that epoch's order of the file) of the first `taken` rows of a lane."""
    pieces = stream.pieces(counts, seed=1, **where)
    rows = ((piece.epoch, piece.file, place) for piece in pieces for place in range(piece.start, piece.stop))
    return list(itertools.islice(rows, taken))


@pytest.mark.parametrize("counts", [[4, 9, 1, 7], [2], [1, 1], [0, 5, 3]])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_the_pieces_of_all_lanes_are_the_epochs(counts: list[int], lanes: int) -> None:
    """Brute force over seven epochs, sets smaller than the number of lanes and an empty file included."""
    epochs, total = 7, sum(counts)
    taken = [(epochs * total + lane) // lanes for lane in range(lanes)]
    rows = [row for lane in range(lanes) for row in rows_of(counts, taken[lane], lane=lane, lanes=lanes)]
    assert sorted(rows) == [(e, f, k) for e in range(epochs) for f, n in enumerate(counts) for k in range(n)]
    assert max(taken) - min(taken) <= 1
    for lane in range(lanes):
        whole = rows_of(counts, taken[lane], lane=lane, lanes=lanes)
        for start in range(taken[lane]):
            assert rows_of(counts, taken[lane] - start, start=start, lane=lane, lanes=lanes) == whole[start:]


@pytest.mark.parametrize("row_bytes", [1, 2**20, 2**25, 2**30])
def test_tasks_take_neighbouring_pieces_until_they_are_worth_starting(row_bytes: int) -> None:
    def todo() -> Iterator[Any]:
        return stream.pieces([4, 9, 1, 7], seed=1)

    tasks = list(itertools.islice(stream._together(todo(), row_bytes), 40))
    taken = [piece for task in tasks for piece in task]
    assert taken == list(itertools.islice(todo(), len(taken)))
    for task in tasks:
        sizes = [(piece.stop - piece.start) * row_bytes for piece in task]
        assert sum(sizes[:-1]) < stream.LEAST  # the last one was wanted
        assert sum(sizes) >= stream.LEAST or len(task) == stream.MOST


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ray_data_gives_each_slice_once_per_epoch_over_all_workers(ray_local: None, store: Store, world: int) -> None:
    """Two epochs, which no worker exceeds by more than the rows of its last batch."""
    batch, total = 2 * world, 2 * COUNT
    seen: list[int] = []
    for rank in range(world):
        part = (total + rank) // world
        batches = stream.ray_batches(store, None, None, batch, seed=4, rank=rank, world=world)
        seen += [index for step in first(batches, -(-part // 2)) for index in step][:part]
    assert sorted(seen) == sorted([*range(COUNT), *range(COUNT)])


def test_a_stream_that_is_left_leaves_no_thread_reading(ray_local: None, store: Store) -> None:
    """Ray ends the process of a thread that reads while Ray goes down."""
    before = set(threading.enumerate())
    streams = [stream.ray_batches(store, None, None, 4, seed=seed) for seed in (0, 1)]
    for batches in streams:
        next(batches)
    reading = {thread for thread in threading.enumerate() if thread.name == "iter_threaded"} - before
    assert reading, "Ray Data names its threads otherwise"
    streams.pop().close()
    half = {thread for thread in reading if thread.is_alive()}
    assert len(half) == len(reading) / 2, "the other stream goes on"
    next(streams[0])
    streams.pop().close()
    assert not any(thread.is_alive() for thread in reading)


def test_a_stream_in_lanes_goes_on_in_mid_epoch_with_a_group_of_another_size(ray_local: None, store: Store) -> None:
    """Joint batches of 6 slices in lanes of three each, by one worker, by two, and by one that takes over from two."""

    def joint(world: int, start: int, stop: int) -> list[list[int]]:
        where: dict[str, Any] = {"seed": 4, "start": start, "world": world, "lanes": 2}
        shares = [first(stream.ray_batches(store, None, None, 6, rank=rank, **where), stop - start) for rank in range(world)]
        return [[index for share in step for index in share] for step in zip(*shares, strict=True)]

    steps = -(-COUNT // 3)  # two epochs: COUNT slices of each lane
    whole = joint(1, 0, steps)
    assert joint(2, 0, 8) + joint(1, 8, steps) == whole
    lanes = [[index for step in whole for index in step[3 * lane : 3 * lane + 3]][:COUNT] for lane in (0, 1)]
    assert sorted(lanes[0] + lanes[1]) == sorted([*range(COUNT), *range(COUNT)])
    with pytest.raises(UsageError, match="a batch of 6 slices cannot be shared by 4 workers"):
        next(stream.ray_batches(store, None, None, 6, seed=4, lanes=4))


def test_ray_data_orders_by_seed_and_epoch_and_continues(
    ray_local: None, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the seams between executions too, of three files each here."""
    monkeypatch.setattr(stream, "PLAN", 3)

    def take(steps: int, **where: int) -> list[list[int]]:
        return first(stream.ray_batches(store, None, None, 4, **cast(Any, where)), steps)

    whole = take(2 * COUNT // 4, seed=0)
    assert take(len(whole), seed=0) == whole
    assert take(len(whole) - 11, seed=0, start=11) == whole[11:]
    assert take(len(whole), seed=1) != whole
    flat = [index for step in whole for index in step]
    assert flat[:COUNT] != flat[COUNT:]
    assert sorted(flat[:COUNT]) == list(range(COUNT))


@pytest.mark.parametrize(("patients", "labelled"), [(None, None), (["a", "d"], None), (None, True), (None, False)])
def test_ray_data_delivers_the_batches_of_memory(
    ray_local: None, store: Store, patients: list[str] | None, labelled: bool | None
) -> None:
    """Pixels, padding, labels, numbering: `index` is the row in memory."""
    slices = Slices.read(store, patients, labelled)
    for batch in itertools.islice(stream.ray_batches(store, patients, labelled, 6, seed=0), 4):
        expected = slices.take(batch["index"])
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value), key
            assert batch[key].dtype == value.dtype


def test_ray_data_reads_while_training_holds_every_cpu(ray_local: None, store: Store) -> None:
    import ray

    @ray.remote(num_cpus=2)
    class Training:
        def step(self, root: Path) -> list[int]:
            batches = stream.ray_batches(Store.open(root), None, None, 4, seed=0)
            return [index for step in first(batches, 3) for index in step]

    training = Training.remote()
    here = [index for step in first(stream.ray_batches(store, None, None, 4, seed=0), 3) for index in step]
    assert ray.get(training.step.remote(store.root), timeout=60) == here
    ray.kill(training)


def test_labelled_and_unlabelled_streams_run_at_their_own_pace_and_from_any_step(store):
    """Equal to what the two streams give alone; labels of the second do not travel."""
    every = Slices.read(store)
    ours, theirs = every.select(["a"], labelled=True), every.select(["b", "c", "d"])

    def joint(start: int) -> list[Batch]:
        streams = (stream.node_batches(held, size, seed=1, start=start) for held, size in ((ours, 2), (theirs, 3)))
        return list(itertools.islice(stream.beside(*streams), 20 - start))

    whole = joint(0)
    for batch, again in zip(whole[13:], joint(13), strict=True):
        assert batch.keys() == again.keys()
        assert all(torch.equal(batch[key], again[key]) for key in batch)
    for batch, own, other in zip(
        whole, stream.node_batches(ours, 2, seed=1), stream.node_batches(theirs, 3, seed=1), strict=False
    ):
        assert all(torch.equal(batch[key], own[key]) for key in own)
        assert batch.keys() - own.keys() == {f"unlabelled_{key}" for key in stream.UNLABELLED_KEYS}
        assert torch.equal(batch["unlabelled_image"], other["image"])
        assert torch.equal(batch["unlabelled_size"], other["size"])
