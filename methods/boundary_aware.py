"""Boundary-aware information maximisation: clusters of pixels that are balanced, and unsure where the image has an edge.

Peng, Wang, Chen, Pedersoli and Desrosiers, "Boundary-aware information maximization for self-supervised medical image
segmentation", Medical Image Analysis 2024, https://doi.org/10.1016/j.media.2024.103150, https://arxiv.org/abs/2202.02371.

    x, T x   a crop and the crop moved (`dense.py`)                                                  (n, c, s, s)
    q        clusters of every cell of the decoder's map, of x and of T x, S heads                   (S, n, K, *)
    L        redundancy · L_RR (`hooks/redundancy_reduction.py`) + boundary · L_CC (`hooks/boundary_aware.py`)

This is the pretraining that the hook of the same name has the terms of. K = 40, three linear heads, windows of 5 and power 0.75
are those of the experiments on ACDC, as is the schedule of 50 epochs of 300 steps. In the best of them the encoder's contrast
by partitions stands beside this loss; here it is a pretraining of its own, before this one (`infonce`, then `further`; the
preset boundary-acdc). `redundancy=1 boundary=0 alpha=0` is IIC without displacements. T is a draw of the chain of `simsiam.py`.
Transfers: the encoder and the decoder. The heads are dropped.
"""

import dataclasses
from dataclasses import dataclass

from torch import nn

from medssl.methods import settings
from medssl.methods.dense import Dense
from medssl.methods.hooks import boundary_aware
from medssl.methods.protocol import Method

TRANSFERS = "encoder+decoder"


@dataclass(frozen=True, kw_only=True)
class Config(settings.Dense, settings.Boundary):
    pass


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 15_000  # 50 epochs of 300
    optimizer: settings.Optimizer = "adam"  # there RAdam, with a warm-up of 10 epochs
    lr: float = 2e-4
    end_lr: float = 1e-7
    warmup: float = 10 / 50
    weight_decay: float = 0.0
    batch: int = 18  # there 6 volumes x 3 partitions
    stop_on_collapse: bool = False  # clusters are kept apart by the loss, features need not be


class BoundaryAware(Dense):
    def __init__(self, network: nn.Module, config: Config | None = None):
        config = config or Config()
        shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(settings.Boundary)}
        hook = boundary_aware.BoundaryAware(network, boundary_aware.Config(weight=1.0, layer="decoder", **shared))
        super().__init__(network, hook, config)


METHOD: type[Method] = BoundaryAware
