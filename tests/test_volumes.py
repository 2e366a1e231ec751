"""Three dimensions: volumes are their slices, each once per epoch, and a 3D network goes the whole way to a prediction."""

import copy
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medssl import cli
from medssl.methods import settings, simsiam
from medssl.methods.networks import unet
from medssl.methods.protocol import UNLABELLED
from medssl.platform import catalogue, checkpoint, evaluate, loop, stream
from medssl.platform.datasets import phantom
from medssl.platform.records import Volume
from medssl.platform.stream import Slices
from medssl.platform.volumes import Volumes

SHAPES = [(5, 7, 4), (6, 4, 9), (8, 8, 2), (3, 9, 6), (5, 7, 5)]  # rows, columns, slices
LABELLED = [True, False, True, True, False]
COUNT = len(SHAPES)

Pair = tuple[NDArray[np.int16], NDArray[np.uint8]]


def drawn() -> list[Pair]:
    """Images (c, h, w, z) of two channels, and class ids (h, w, z): UNLABELLED where nobody annotated."""
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 200, (2, *shape)).astype(np.int16) for shape in SHAPES]
    labels = [rng.integers(0, 3, shape).astype(np.uint8) for shape in SHAPES]
    for label, known in zip(labels, LABELLED, strict=True):
        label[:] = label if known else UNLABELLED
    return list(zip(images, labels, strict=True))


@pytest.fixture(scope="module")
def slices() -> Slices:
    """The slices of `drawn`, shuffled over all volumes and padded as the store's reader pads them."""
    rows = [(number, z) for number, shape in enumerate(SHAPES) for z in range(shape[2])]
    rows = [rows[at] for at in np.random.default_rng(1).permutation(len(rows))]
    volumes, height, width = drawn(), 8, 9
    image = torch.zeros(len(rows), 2, height, width, dtype=torch.int16)
    label = torch.full((len(rows), height, width), UNLABELLED, dtype=torch.uint8)
    for at, (number, z) in enumerate(rows):
        h, w, _ = SHAPES[number]
        image[at, :, :h, :w] = torch.from_numpy(volumes[number][0][..., z].copy())
        label[at, :h, :w] = torch.from_numpy(volumes[number][1][..., z].copy())
    number = torch.tensor([number for number, _ in rows])
    return Slices(
        image=image,
        label=label,
        labelled=torch.tensor(LABELLED)[number],
        size=torch.tensor([SHAPES[number][:2] for number, _ in rows]),
        position=torch.zeros(len(rows)),
        patient=number // 2,
        volume=number,
        slice_index=torch.tensor([z for _, z in rows]),
        spacing_mm=torch.ones(len(rows), 3),
        patient_names=("a", "b", "c"),
        volume_names=tuple(f"v{number}" for number in range(COUNT)),
    )


# From slices to volumes


@pytest.mark.parametrize("least", [1, 6, 11])
def test_a_batch_holds_every_voxel_of_its_volumes_and_else_padding(slices: Slices, least: int) -> None:
    order = [3, 1, 1, 0, 4, 2]
    batch = Volumes.of(slices, least).take(order)
    height, width, depth = (max(least, length) for length in (8, 9, 9))
    assert batch["image"].shape == (6, 2, height, width, depth)
    for at, number in enumerate(order):
        h, w, z = SHAPES[number]
        image, label = np.zeros((2, height, width, depth), np.int16), np.full((height, width, depth), UNLABELLED, np.uint8)
        image[:, :h, :w, :z], label[:h, :w, :z] = drawn()[number]
        np.testing.assert_array_equal(batch["image"][at], image)
        np.testing.assert_array_equal(batch["label"][at], label)
        assert batch["size"][at].tolist() == [max(least, length) for length in (h, w, z)]
    assert batch["image"].dtype == torch.int16
    assert batch["index"].tolist() == batch["volume"].tolist() == order
    assert batch["patient"].tolist() == [number // 2 for number in order]


def test_volumes_of_some_patients_are_those_of_all(slices: Slices) -> None:
    every, some = Volumes.of(slices), Volumes.of(slices.select(["b", "c"]))
    assert len(some) == 3
    assert some.take([0, 1, 2])["volume"].tolist() == [2, 3, 4]
    part, whole = some.take([0, 1, 2]), every.take([2, 3, 4])
    for key in ("image", "label"):  # what all have is one slice deeper
        assert torch.equal(part[key], whole[key][..., :6])
    assert torch.equal(part["size"], whole["size"])


def test_volumes_without_any_label_are_unlabelled(slices: Slices) -> None:
    values = {field: getattr(slices, field) for field in Slices.__dataclass_fields__} | {"label": None}
    assert (Volumes.of(Slices(**values), 10).take([0, 3])["label"] == UNLABELLED).all()


def test_volumes_share_the_memory_of_the_slices(slices: Slices) -> None:
    shared = Slices.from_arrays(slices.arrays())
    assert Volumes.of(shared, least=64).slices.image.data_ptr() == slices.image.data_ptr()


def first(batches, steps: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in itertools.islice(batches, steps)]


@pytest.mark.parametrize(("batch", "world"), [(2, 1), (2, 2), (6, 3), (12, 2)])
def test_workers_together_see_each_volume_once_per_epoch_and_can_continue(slices: Slices, batch: int, world: int) -> None:
    volumes, steps = Volumes.of(slices), 4 * COUNT // batch + 1
    shares = [first(stream.node_batches(volumes, batch, seed=3, rank=r, world=world), steps) for r in range(world)]
    seen = [index for step in zip(*shares, strict=True) for share in step for index in share]
    for epoch in range(4):
        assert seen[epoch * COUNT : (epoch + 1) * COUNT] == stream.order(COUNT, 3, epoch).tolist()
    for rank, share in enumerate(shares):
        again = stream.node_batches(volumes, batch, seed=3, start=1, rank=rank, world=world)
        assert first(again, steps - 1) == share[1:]


# From volumes to labels


class Threshold(nn.Module):
    """Class 1 where the first channel is above one half, in any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], dim=1)


class Upper(nn.Module):
    """Class 1 in the upper half of the last axis; remembers the shapes that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        upper = (torch.arange(x.shape[-1]) >= x.shape[-1] // 2).float().expand_as(x[:, 0])
        return torch.stack([1 - upper, upper], dim=1)


def scan(slices: int = 9, channels: int = 1, height: int = 14, width: int = 21) -> Volume:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (slices, channels, height, width), generator=generator, dtype=torch.uint8)
    return Volume("anna", "anna_left", image, (image[:, 0] > 127).byte(), (1.0, 1.5, 3.0))


@pytest.mark.parametrize("side", [None, 8, 16, 24])
def test_cubes_equal_the_whole_volume_for_a_pointwise_network(side: int | None) -> None:
    """Also where the volume is thinner than a cube."""
    torch.manual_seed(0)
    volume, network = scan(channels=2), nn.Conv3d(2, 4, kernel_size=1)
    flat = nn.Conv2d(2, 4, kernel_size=1)
    flat.load_state_dict({"weight": network.weight[..., 0].detach(), "bias": network.bias.detach()})
    solid = evaluate.probabilities(network, volume, side=side, spatial_dims=3)
    assert solid.shape == (9, 4, 14, 21)
    torch.testing.assert_close(solid, evaluate.probabilities(flat, volume, side=None))
    assert torch.equal(evaluate.infer(network, volume, side=side, spatial_dims=3), solid.argmax(1).byte())


def test_the_last_axis_of_a_3d_network_runs_over_the_slices() -> None:
    prediction = evaluate.infer(Upper(), scan(slices=10), side=None, spatial_dims=3)
    assert prediction.flatten(1).float().mean(1).tolist() == [0.0] * 5 + [1.0] * 5


def test_no_forward_pass_over_cubes_is_larger_than_what_is_allowed() -> None:
    network = Upper()
    evaluate.infer(network, scan(slices=70, height=70, width=70), side=64, spatial_dims=3)
    assert {shape[2:] for shape in network.shapes} == {(64, 64, 64)}
    assert max(shape[0] for shape in network.shapes) == evaluate.VOXELS // 64**3 == 2


def test_a_perfect_3d_network_scores_one() -> None:
    scores = evaluate.score(Threshold(), [scan()], ["background", "organ"], "val", side=8, spatial_dims=3)
    assert {score.metric: score.value for score in scores}["dice"] == 1


# From a command line to a prediction


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten coarse phantoms, prepared; returns the folder of scans, whose sibling `data` is prepared."""
    root = tmp_path_factory.mktemp("three")
    phantom.generate(root / "tiny", patients=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(root / "data"))
        changes = {"spacing_mm": (10.0, 10.0, 10.0), "pad": 16}
        catalogue.prepare(str(root / "tiny"), changes=changes, workers=2, say=lambda text: None)
    return root / "tiny"


SMALL = [
    "network.width=4", "network.levels=2", "pretrain.side=16", "pretrain.d=16", "pretrain.bottleneck=8",
    "pretrain.training.steps=10", "pretrain.training.batch=4", "finetune.side=24", "finetune.training.steps=8",
    "finetune.training.batch=2", "finetune.training.evaluations=2",
]  # fmt: skip


@pytest.fixture
def typed(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Types a command on the tiny phantom; gives exit code and all that was printed."""
    monkeypatch.setenv("MEDSSL_DATA", str(scans.parent / "data"))
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))

    def type_(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["medssl", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return type_


def overrides(*more: str) -> list[str]:
    return [word for text in (*SMALL, *more) for word in ("-o", text)]


@pytest.mark.slow
def test_three_dimensions_end_to_end_from_the_store_that_slices_come_from(typed, scans: Path, tmp_path: Path) -> None:
    solid = ("--data", "tiny", "--spatial-dims", 3, *overrides())
    code, said = typed("pretrain", "simsiam", *solid)
    assert code == 0, said
    pretrained = re.search(r"simsiam-\w+(?=: finished after 10 steps)", said)
    assert pretrained, said
    code, said = typed("finetune", "--from", pretrained[0], *solid)
    assert code == 0, said
    tuned = re.search(r"segment-\w+(?=: validation)", said)
    assert tuned, said

    folder = tmp_path / "runs" / "stages" / tuned[0]
    weights = checkpoint.load(folder / "best.pt")["network"]
    assert weights["encoder.blocks.0.0.weight"].shape == (4, 1, 3, 3, 3)
    assert (tmp_path / "runs" / "stages" / pretrained[0] / "iou.json").exists()
    code, said = typed("evaluate", tuned[0], "--pictures", tmp_path / "pictures", "--json")
    assert code == 0, said
    scores, _ = json.JSONDecoder().raw_decode(said)  # the pictures' names follow
    assert 0 <= scores["test"]["mean"]["dice"] <= 1
    assert len(list((tmp_path / "pictures").iterdir())) == 2

    scan = sorted((scans / "imagesTr").glob("*.nii.gz"))[0]
    code, said = typed("predict", tuned[0], scan, "--out", tmp_path / "predicted")
    assert code == 0, said
    answer = nibabel.load(tmp_path / "predicted" / scan.name.replace("_0000", ""))
    assert answer.shape == nibabel.load(scan).shape
    assert len(np.unique(np.asarray(answer.dataobj))) > 1

    code, said = typed("finetune", "--from", pretrained[0], "--data", "tiny", "--spatial-dims", 2, *overrides())
    assert code == 2
    assert "reads 3D, not 2D" in said


@pytest.mark.slow
def test_volumes_thinner_than_a_crop_are_trained_on_and_scored(typed) -> None:
    code, said = typed("finetune", "--data", "tiny", "--spatial-dims", 3, *overrides("finetune.side=40"))
    assert code == 0, said
    assert re.search(r"test 0\.\d+ \(dice\)", said)


def test_stopped_and_continued_equals_not_stopped_in_3d(slices: Slices, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of six steps of SimSiam on cubes, in another process as it were."""
    monkeypatch.setattr(loop, "SAVING", math.inf)
    volumes, training = Volumes.of(slices, least=8), settings.Training(batch=4, optimizer="sgd", lr=0.05)
    saved: dict[int, checkpoint.State] = {}

    def train(seed: int, **more: Any) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        network = unet.UNet(2, 3, unet.Config(width=4, levels=2, spatial_dims=3))
        method = simsiam.SimSiam(network.encoder, simsiam.Config(side=6, d=16, bottleneck=8, iou=None))
        batches = lambda start: stream.node_batches(volumes, 4, seed=0, start=start)  # noqa: E731
        loop.train(method, batches, training, steps=6, seed=0, report_seconds=0, save_seconds=0, **more)
        return method.state_dict()

    whole = train(0, save=lambda state: saved.update({state["step"]: copy.deepcopy(state)}))
    assert set(saved) == {1, 2, 3, 4, 5, 6}
    for step in (1, 4):
        continued = train(1, resume=saved[step])
        assert all(torch.equal(continued[key], value) for key, value in whole.items())


def test_volumes_that_do_not_fit_in_memory_are_refused_and_not_streamed(typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fits", lambda *_: False)
    code, said = typed("pretrain", "simsiam", "--data", "tiny", "--spatial-dims", 3, *overrides())
    assert code == 1
    assert "not streamed from disk in 3D; use fewer patients" in said
    code, said = typed("pretrain", "simsiam", "--data", "tiny", "--spatial-dims", 3, *overrides("data.stream=node"))
    assert code == 0, said


def test_a_dry_run_speaks_of_volumes(typed) -> None:
    code, said = typed("sweep", "pretraining", "--data", "tiny", "--spatial-dims", 3, "--dry-run", *overrides())
    assert code == 0, said
    assert "10 steps of 4 volumes, crops of 16 px" in said
