"""InfoNCE with meta-labels as a pretraining; known values of its loss are those of hooks/test_known_contrastyou.py."""

import torch

from medssl.methods.infonce import Config, InfoNCE, by_height
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import Encoder
from medssl.methods.protocol import Step


def method(**changes) -> InfoNCE:
    torch.manual_seed(0)
    return InfoNCE(Encoder(1, UNetConfig(width=4, levels=2, norm="batch")), Config(side=8, hidden=8, d=4, **changes))


def batch() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(6, 1, 16, 16, generator=rng),
        "size": torch.full((6, 2), 16),
        "position": torch.tensor([0.0, 0.5, 1.0] * 2),
        "patient": torch.tensor([0, 0, 0, 1, 1, 1]),
        "phase": torch.tensor([0, 1, 0, 1, 0, 1]),
    }


def test_each_meta_label_is_a_term_of_its_share_and_the_pace_takes_the_easy_pairs_first():
    labels = {"labels": ("partition", "patient", "cycle", "self")}
    subject = method(**labels, shares=(1.0, 0.5, 0.5, 0.5), corrected=False)
    views = subject.augment(batch(), torch.Generator().manual_seed(0))
    early, late = (subject.loss(views, Step(index, 1000)) for index in (0, 999))
    whole = method(**labels, shares=(1.0, 1.0, 1.0, 1.0), pace="none").loss(views, Step(0, 1000))
    for kind, share in zip(labels["labels"], (1.0, 0.5, 0.5, 0.5), strict=True):
        assert 0 <= early.terms[kind] < late.terms[kind] < share * whole.terms[kind]
        assert early.monitors[f"{kind}/weight"] < late.monitors[f"{kind}/weight"] < 1


def test_partitions_that_count_slices_are_those_of_positions_for_any_depth():
    for depth in (4, 7, 10, 23):
        position = torch.arange(depth) / (depth - 1)
        thirds = by_height(position, torch.full((depth,), depth), 3, "thirds")
        assert thirds.tolist() == sorted(thirds.tolist())
        assert thirds.unique().tolist() == [0, 1, 2]
        assert len(by_height(position, None, 3, "equal")) == depth
