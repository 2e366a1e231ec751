"""Dense IIC: the cluster of a cell tells the clusters of the cells near it in the moved slice.

Peng, Pedersoli and Desrosiers, "Boosting semi-supervised image segmentation with global and local mutual information
regularization", MELBA 2021, https://arxiv.org/abs/2103.04813, its local term; after Ji, Henriques and Vedaldi, "Invariant
information clustering", ICCV 2019, https://arxiv.org/abs/1807.06653.

    x, T x   a crop and the crop moved (`dense.py`)                                                  (n, c, s, s)
    q        clusters of every cell of the decoder's map, T q(x) and q(T x), S heads                 (S, n, K, *)
    P_u      joint probability of q at a cell and q displaced from it by u, up to `reach` cells on each axis       (S, K, K)
    L        mean over heads and u of minus the mutual information of P_u, marginals weighed by λ    (`clusters.py`)

Cells that T x does not show count nowhere. In Contrast-You's raw runs on ACDC pretraining by mutual information is worse than
none (a Dice of 0.69 against 0.76), while the same term beside labels helps (`hooks/mutual_information.py`): a control.
K = 20, S = 5 and linear heads are the paper's, there in two layers of the decoder with displacements up to 1 and 3; here the
last alone with 1, as in the hook, since the cost grows with the square of 2 reach + 1. The schedule is Contrast-You's
(https://github.com/jizongFox/Contrast-You); T is a draw of the chain of `simsiam.py`, there flips.
Transfers: the encoder and the decoder.
"""

from dataclasses import dataclass

from torch import nn

from medssl.methods import settings
from medssl.methods.dense import Dense
from medssl.methods.hooks import mutual_information
from medssl.methods.protocol import Method

TRANSFERS = "encoder+decoder"


@dataclass(frozen=True, kw_only=True)
class Config(settings.Dense):
    reach: int = 1  # largest displacement, cells
    clusters: int = 20  # K
    heads: int = 5  # S
    balance: float = 1.0  # λ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 2 or self.heads < 1 or self.balance <= 0 or self.reach < 0:
            raise ValueError("expected clusters of at least 2, heads of at least 1, balance above 0 and reach of at least 0")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 15_000  # 50 epochs of 300
    optimizer: settings.Optimizer = "adam"
    lr: float = 2e-4
    end_lr: float = 1e-7
    warmup: float = 10 / 50
    weight_decay: float = 0.0
    batch: int = 18
    stop_on_collapse: bool = False  # clusters are kept apart by the loss, features need not be


class DenseIIC(Dense):
    def __init__(self, network: nn.Module, config: Config | None = None):
        config = config or Config()
        term = mutual_information.Config(
            weight=1.0,
            layers=("decoder",),
            shares=(1.0,),
            reach=(config.reach,),
            clusters=config.clusters,
            heads=config.heads,
            balance=config.balance,
        )
        super().__init__(network, mutual_information.MutualInformation(network, term), config)


METHOD: type[Method] = DenseIIC
