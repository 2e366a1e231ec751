"""Dense InfoNCE: a cell of a slice finds itself in the moved slice, among the cells of all slices.

Peng, Wang, Pedersoli and Desrosiers, "Self-paced contrastive learning for semi-supervised medical image segmentation with
meta-labels", NeurIPS 2021, https://arxiv.org/abs/2107.13741; its contrast of the decoder, whose meta-label is the place.

    x, T x   a crop and the crop moved (`dense.py`)                                                  (n, c, s, s)
    f        the decoder's map, T f(x) and f(T x), averaged to `grid` cells per axis
    z        head of `places` cells of each crop, the same in both views, length 1                   (2 n places, d)
    L        mean over i of l_ij of `infonce.py`; j is i's cell in the other view, rivals are all other cells of all workers

Cells that T x does not show in full take no part. Defaults are those of the published code
(https://github.com/jizongFox/Self-paced-Contrastive-Learning): grids of 10 cells and 5 places. Encoder and decoder are trained;
there the encoder's contrast stands beside this term (1 to 0.1), here it is a pretraining of its own, before this one
(`infonce`, then `further`). T is a draw of the chain of `simsiam.py`, there flips. Transfers: the encoder and the decoder.
"""

from dataclasses import dataclass

from torch import nn

from medssl.methods import settings
from medssl.methods.dense import Dense
from medssl.methods.hooks import infonce
from medssl.methods.protocol import Method

TRANSFERS = "encoder+decoder"


@dataclass(frozen=True, kw_only=True)
class Config(settings.Dense):
    temperature: float = 0.07  # τ
    hidden: int = 256
    d: int = 256
    grid: int = 10  # cells per axis that the map is averaged to
    places: int = 5  # cells drawn in each crop

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.temperature, self.hidden, self.d, self.grid, self.places) <= 0:
            raise ValueError("expected temperature, hidden, d, grid and places above 0")
        if self.places > self.grid**2:
            raise ValueError(f"places is {self.places}: a map of {self.grid} x {self.grid} cells has fewer")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 16_000  # 80 epochs of 200
    optimizer: settings.Optimizer = "adam"  # there RAdam, with a warm-up of 10 epochs
    lr: float = 2e-4
    end_lr: float = 1e-7
    warmup: float = 10 / 80
    weight_decay: float = 0.0
    batch: int = 30
    stop_on_collapse: bool = False  # the loss itself keeps cells apart, the mean of a map may be one


class DenseInfoNCE(Dense):
    def __init__(self, network: nn.Module, config: Config | None = None):
        config = config or Config()
        term = infonce.Config(
            layer="decoder",
            labels=("place",),
            temperature=config.temperature,
            hidden=config.hidden,
            d=config.d,
            grid=config.grid,
            places=config.places,
        )
        super().__init__(network, infonce.InfoNCE(network, term), config)


METHOD: type[Method] = DenseInfoNCE
