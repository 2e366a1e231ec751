"""Two workers with a part of the batch each equal one worker with all of it: losses, averaged gradients, statistics.

The parts are unequal on purpose (5 and 3 slices). This file is also the program of a worker: `test_gather.py RANK FOLDER`.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medssl.methods import barlow_twins, byol, gather, global_contrast, iic, infonce, local_contrast, mae, simclr, vicreg
from medssl.methods.augment import Geometry, Pair
from medssl.methods.hooks import pdcr
from medssl.methods.networks import unetr
from medssl.methods.networks.unet import Config, UNet
from medssl.methods.protocol import UNLABELLED, Step, Views
from medssl.methods.segment import Config as SegmentConfig
from medssl.methods.segment import Segment
from medssl.methods.simsiam import SimSiam
from medssl.platform import find, partitions

PARTS = [slice(0, 5), slice(5, 8)]
WHOLE = slice(0, 8)
Objective = Callable[[slice], Tensor]


class Whole(nn.Module):
    """A module and its objective in one forward pass, as DDP wants it."""

    def __init__(self, module: nn.Module, objective: Objective):
        super().__init__()
        self.module, self.objective = module, objective

    def forward(self, part: slice) -> Tensor:
        return self.objective(part)


def simsiam() -> Whole:
    from medssl.methods.simsiam import Config as Heads

    encoder = UNet(1, 2, Config(width=4, levels=2, norm="batch")).encoder  # batch statistics of maps and of rows
    method = SimSiam(encoder, Heads(side=8, d=16, bottleneck=8))
    x1, x2 = torch.randn(2, 8, 1, 8, 8)
    return Whole(method, lambda part: method.loss(Views([x1[part], x2[part]]), Step(0, 1)).total)


def contrastive() -> Whole:
    """A toy InfoNCE: each row finds its partner among the rows of everybody."""
    layer = nn.Linear(6, 4)
    x1, x2 = torch.randn(2, 8, 6)

    def objective(part: slice) -> Tensor:
        z1, z2 = layer(x1[part]), layer(x2[part])
        keys, first = gather.rows(z2)
        own = torch.arange(first, first + len(z1))
        return gather.mean(F.cross_entropy(z1 @ keys.T, own, reduction="sum"), len(z1))

    return Whole(layer, objective)


def gathered_whole() -> Whole:
    """A loss that every worker computes over all gathered rows."""
    layer = nn.Linear(6, 4)
    x = torch.randn(8, 6)
    return Whole(layer, lambda part: gather.rows(layer(x[part]))[0].T.cov().square().sum())


def segment(dice_over: Literal["slice", "batch"] = "slice", overlap: Literal["dice", "jaccard"] = "dice") -> Whole:
    """The second worker's slices have no label at all, the first's have unequal shares."""
    method = Segment(UNet(1, 3, Config(width=4, levels=2)), SegmentConfig(dice_over=dice_over, overlap=overlap))
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8, 8, 8))
    labels[1, :5] = labels[3] = labels[5:] = UNLABELLED
    return Whole(method, lambda part: method.loss(Views([images[part]], labels=labels[part]), Step(0, 1)).total)


def contrasted() -> Whole:
    """PDCR's three terms; the second worker has no label at all."""
    network = UNet(1, 3, Config(width=4, levels=2, norm="batch"))
    maps = ("encoder.blocks.0", "encoder.blocks.1")
    settings = {"encoder": maps, "encoder_samples": (8, 4), "decoder": ("decoder.blocks.0",), "decoder_samples": (4,)}
    hook = pdcr.PDCR(network, pdcr.Config(cross=maps, cross_samples=4, cross_stride=2, **settings))
    method = Segment(network, SegmentConfig(), {"pdcr": hook})
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8, 8, 8))
    labels[1, :5] = labels[3] = labels[5:] = UNLABELLED

    def objective(part: slice) -> Tensor:
        return method.loss(Views([images[part]], labels=labels[part], drawn={"pdcr": {}}), Step(0, 1)).total

    return Whole(method, objective)


def paired(method: Callable[[nn.Module], nn.Module]) -> Whole:
    """A method of two views, batch norm in its encoder; slices of both workers share a patient and a height."""
    model = method(UNet(1, 2, Config(width=4, levels=2, norm="batch")).encoder)
    views = [torch.randn(8, 1, 8, 8) for _ in range(2)]
    shared = {"position": torch.linspace(0, 1, 8)[[0, 7, 2, 5, 4, 3, 6, 1]], "patient": torch.arange(8) % 3}

    def objective(part: slice) -> Tensor:
        groups = {key: values[part] for key, values in shared.items()}
        return model.loss(Views([view[part] for view in views], groups=groups), Step(0, 1)).total

    return Whole(model, objective)


def partitioned(
    strategy: Literal["random", "partition-negatives", "partition-positives"], pairing: Literal["all", "ring"] = "all"
) -> Whole:
    """Global contrast: partners and negatives of a slice lie with both workers."""
    model = global_contrast.GlobalContrast(
        UNet(1, 2, Config(width=4, levels=2, norm="batch")).encoder,
        global_contrast.Config(strategy=strategy, pairing=pairing, side=8, grid=2, d=6, hidden=12),
    )
    views, where, whose = torch.randn(2, 8, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 1, 2, 0]), torch.arange(8) // 3

    def objective(part: slice) -> Tensor:
        groups = {"partition": where[part], "volume": whose[part]}
        return model.loss(Views([view[part] for view in views], groups=groups), Step(0, 1)).total

    return Whole(model, objective)


def composed(method: Literal["global", "local"]) -> Whole:
    """The loss of 4 volumes x 2 partitions that the batch planner chose, from the batch to the loss.

    Each worker composes its own share; where a part is no worker's share of 2, as in the whole, all is one worker's.
    """
    volume = np.repeat(np.arange(5), [3, 1, 4, 2, 6])
    position = np.concatenate([np.arange(n, dtype=np.float32) / max(n - 1, 1) for n in (3, 1, 4, 2, 6)])
    images = torch.randn(2, 16, 1, 16, 16)
    network = UNet(1, 2, Config(width=4, levels=3, norm="batch"))
    model: nn.Module = global_contrast.GlobalContrast(
        network.encoder, global_contrast.Config(partitions=2, side=16, grid=2, d=6, hidden=12)
    )
    if method == "local":
        settings = {"blocks": 1, "regions": 5, "region": 1, "negatives": 2, "side": 16}
        model = local_contrast.LocalContrast(network, local_contrast.Config(strategy="correspondence", **settings))

    def objective(part: slice) -> Tensor:
        world = gather.workers()
        rank = dist.get_rank() if world > 1 else 0
        rows = torch.from_numpy(
            next(partitions.indices(volume, position, volumes=4, partitions=2, seed=1, start=2, rank=rank, world=world))
        )
        groups = {"partition": global_contrast.partition(torch.from_numpy(position)[rows], 2)}
        groups["volume"] = torch.from_numpy(volume)[rows]
        return model.loss(Views(list(images[:, rows]), groups=groups), Step(0, 1)).total

    return Whole(model, objective)


def regional() -> Whole:
    """Local contrast: slices of one partition in volumes of both workers correspond."""
    model = local_contrast.LocalContrast(
        UNet(1, 2, Config(width=4, levels=3, norm="batch")),
        local_contrast.Config(strategy="correspondence", blocks=1, regions=5, region=1, negatives=2, side=16),
    )
    views, where, whose = torch.randn(2, 8, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 1, 2, 0]), torch.arange(8) // 3

    def objective(part: slice) -> Tensor:
        groups = {"partition": where[part], "volume": whose[part]}
        return model.loss(Views([view[part] for view in views], groups=groups), Step(0, 1)).total

    return Whole(model, objective)


def masked(encoder: nn.Module) -> Whole:
    """MAE: the hidden patches of both workers together are averaged."""
    method = mae.MAE(encoder, mae.Config(side=16, d=8, depth=1, heads=2, width=4, patch=8))
    x, mask = torch.randn(8, 1, 16, 16), mae.draw_mask(8, 4, 3, torch.Generator().manual_seed(0))
    return Whole(method, lambda part: method.loss(Views([x[part]], masks=[mask[part]]), Step(0, 1)).total)


def hooked(*names: str, **settings: Any) -> Whole:
    """Labelled and unlabelled crops shared unequally, some of them beyond their slice; batch norms in network and teachers."""
    network = UNet(1, 3, Config(width=4, levels=2, norm="batch"))
    network.head.weight.data.mul_(10)  # sure of something: some hooks wait for that
    modules = {name: importlib.import_module(f"medssl.methods.hooks.{name}") for name in names}
    hooks = {name: module.HOOK(network, module.Config(ramp="constant", **settings)) for name, module in modules.items()}
    method = Segment(network, SegmentConfig(side=8, crops=1), hooks)
    image, size = torch.rand(8, 1, 9, 9), torch.tensor([[9, 9]] * 6 + [[5, 9], [9, 3]])
    batch = {"image": image, "label": torch.randint(0, 3, (8, 9, 9), dtype=torch.uint8), "size": torch.full((8, 2), 9)}
    batch |= {"unlabelled_image": image, "unlabelled_size": size}
    batch |= {"unlabelled_position": torch.linspace(0, 1, 8), "unlabelled_patient": torch.arange(8) % 3}  # on both workers
    views = method.augment(batch, torch.Generator().manual_seed(0))
    return Whole(method, lambda part: method.loss(share(views, part), Step(5, 10)).total)


def dense(name: str, **settings: Any) -> Whole:
    """Pretraining of a whole network, its crops shared unequally."""
    module = importlib.import_module(f"medssl.methods.{name}")
    network = UNet(1, 3, Config(width=4, levels=2, norm="batch"))
    method = module.METHOD(network, module.Config(side=8, **settings))
    size = torch.tensor([[9, 9]] * 6 + [[5, 9], [9, 3]])
    views = method.augment({"image": torch.rand(8, 1, 9, 9), "size": size}, torch.Generator().manual_seed(0))
    return Whole(method, lambda part: method.loss(share(views, part), Step(5, 10)).total)


def share(views: Views, part: slice) -> Views:
    """A worker's part of views with unlabelled crops."""
    pair = views.unlabelled
    assert pair is not None
    geometry = Geometry(**{key: value[part] for key, value in vars(pair.geometry).items()})
    maps = {key: value[part] for key, value in vars(pair).items() if key not in ("geometry", "groups")}
    groups = {key: value[part] for key, value in pair.groups.items()}
    drawn = {
        name: {key: value[:, part] if key == "noise" else value[part] for key, value in own.items()}  # noise is (passes, m, *)
        for name, own in views.drawn.items()
    }
    labels = None if views.labels is None else views.labels[part]
    own = Pair(**maps, geometry=geometry, groups=groups)
    return Views([image[part] for image in views.images], labels=labels, unlabelled=own, drawn=drawn)


PLACES = {"hidden": 8, "d": 6, "grid": 4}
CLUSTERS = {"clusters": 5, "heads": 2}
CASES: dict[str, Callable[[], Whole]] = {
    "simsiam": simsiam,
    "contrastive": contrastive,
    "gathered_whole": gathered_whole,
    "segment": segment,
    "simclr": lambda: paired(lambda encoder: simclr.SimCLR(encoder, simclr.Config(side=8, d=6, hidden=12))),
    "barlow_twins": lambda: paired(
        lambda encoder: barlow_twins.BarlowTwins(encoder, barlow_twins.Config(side=8, d=4, hidden=12))
    ),
    "byol": lambda: paired(lambda encoder: byol.BYOL(encoder, byol.Config(side=8, d=6, hidden=12))),
    "iic": lambda: paired(lambda encoder: iic.IIC(encoder, iic.Config(side=8, **CLUSTERS))),
    "infonce, pretraining": lambda: paired(lambda encoder: infonce.InfoNCE(encoder, infonce.Config(side=8, d=6, hidden=8))),
    "vicreg": lambda: paired(lambda encoder: vicreg.VICReg(encoder, vicreg.Config(side=8, d=16, hidden=12))),
    "global_contrast": lambda: partitioned("partition-positives"),
    "global_contrast, random": lambda: partitioned("random"),
    "global_contrast, partition-negatives": lambda: partitioned("partition-negatives"),
    "global_contrast, ring": lambda: partitioned("partition-positives", "ring"),
    "global_contrast, composed batch": lambda: composed("global"),
    "local_contrast, correspondence": regional,
    "local_contrast, composed batch": lambda: composed("local"),
    "mae, U-Net": lambda: masked(UNet(1, 2, Config(width=4, levels=2, norm="batch")).encoder),
    "mae, ViT": lambda: masked(unetr.Encoder(1, unetr.Config(patch=8, d=8, depth=4, heads=2, grid=2))),
    "pdcr": contrasted,
    "segment, Dice over the batch": lambda: segment("batch"),
    "segment, Jaccard": lambda: segment("batch", "jaccard"),
    "consistency": lambda: hooked("consistency"),
    "mean_teacher": lambda: hooked("mean_teacher"),
    "uncertainty_mean_teacher": lambda: hooked("uncertainty_mean_teacher"),
    "cross_pseudo_supervision": lambda: hooked("cross_pseudo_supervision"),
    "infonce": lambda: hooked("infonce", labels=("partition", "patient", "self"), hidden=8, d=6),
    "infonce, places": lambda: hooked("infonce", layer="decoder", labels=("place",), **PLACES),
    "infonce, rivals": lambda: hooked("infonce", rivals="negatives", hidden=8, d=6),
    "self_paced": lambda: hooked("self_paced", hidden=8, d=6, gamma=(3.0, 6.0)),
    "self_paced, hard": lambda: hooked("self_paced", hidden=8, d=6, pace="hard", gamma=(2.0, 3.0)),
    "mutual_information": lambda: hooked("mutual_information", **CLUSTERS),
    "mutual_information, output": lambda: hooked("mutual_information", layers=("output",), shares=(1.0,), reach=(1,), patch=4),
    "prototypes": lambda: hooked("prototypes", per_class=3, information=1.0, orthogonality=1.0, agreement=1.0),
    "redundancy_reduction": lambda: hooked("redundancy_reduction", **CLUSTERS),
    "information_maximisation": lambda: hooked("information_maximisation", weight=1.0),
    "superpixel": lambda: hooked("superpixel", hidden=8, d=6, segments=4, sigma=1.0, places=8),
    "boundary_aware": lambda: hooked("boundary_aware", window=3, **CLUSTERS),
    "dense_infonce": lambda: dense("dense_infonce", **PLACES),
    "dense_iic": lambda: dense("dense_iic", **CLUSTERS),
    "boundary_aware, pretraining": lambda: dense("boundary_aware", window=3, **CLUSTERS),
    "imsat": lambda: dense("imsat", **CLUSTERS),
    "three hooks": lambda: hooked("entropy_minimisation", "mean_teacher", "pseudo_label"),
}


ELSEWHERE = {"dino", "ibot", "moco"}  # their own tests compare a whole step of two workers, centres and queues included


def run(case: str, part: slice) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one step over `part`."""
    torch.manual_seed(0)
    model = CASES[case]()
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model  # must outlive the backward pass
    loss = parallel(part)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients | dict(model.named_buffers())


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("workers")
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.result") for rank in (0, 1)]


def test_every_method_is_compared():
    assert {case.split(",")[0] for case in CASES} | ELSEWHERE >= set(find.names("method"))


@pytest.mark.parametrize("case", CASES)
def test_two_workers_with_parts_equal_one_with_the_whole(case, by_workers):
    joint = run(case, WHOLE)
    first, second = (results[case] for results in by_workers)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, joint["loss"], rtol=1e-5, atol=1e-6)
    for worker in (first, second):
        assert worker.keys() == joint.keys()
        for key in joint.keys() - {"loss"}:
            torch.testing.assert_close(worker[key], joint[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 2), (2, 4, 3, 2, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_joint_statistics_of_one_worker_are_those_of_torch(shape, momentum, monkeypatch):
    """The formula that combines workers, fed with one, against nn.BatchNorm: output, gradient, running statistics."""
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    ours, theirs = gather.JointBatchNorm(4, momentum=momentum), kind(4, momentum=momentum)
    xs = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    xs[1].data.copy_(xs[0].data)
    weight = torch.randn(shape)
    for _ in range(2):
        out = ours._joint(xs[0]), theirs(xs[1])
        torch.testing.assert_close(*out)
        for y in out:
            (y * weight).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(xs[0]), theirs.eval()(xs[1]))


def test_gathering_outside_a_group_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather.workers() == 1
    assert gather.rows(x) == (x, 0)
    torch.testing.assert_close(gather.mean(x.sum(), x.numel()), x.mean())


def test_a_mean_over_nothing_is_zero_with_a_gradient_of_zero():
    x = torch.zeros(0, 2, requires_grad=True)
    total = gather.mean(x.sum(), 0)
    total.backward()
    assert total == 0


def test_a_batch_without_variance_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"1 slice.* no variance .*larger batch"):
        gather.JointBatchNorm(4)(torch.randn(1, 4))


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({case: run(case, PARTS[rank]) for case in CASES}, folder / f"{rank}.result")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
