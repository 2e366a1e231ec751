"""iBOT: DINO, and at hidden patches the student predicts what the teacher, who sees them, says of them.

Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022, https://arxiv.org/abs/2111.07832. Section
numbers are that paper's; values that it leaves out are those of the authors' code for ViT-S/16. Blocks of patches are
hidden as in BEiT, Bao et al. 2021, https://arxiv.org/abs/2106.08254, algorithm 1. Symbols of `dino.py`, and

    m        patches of a global view hidden from the student        (n, t) bool
    u        patch tokens of the student, which sees a learned token in place of hidden patches     (n, t, f)
    u'       patch tokens of the teacher, which sees the view whole  (n, t, f)

    L_CLS    L of DINO on class tokens; the student's global views are the masked ones              sec. 2.2
    L_MIM    mean over global views and slices of Σ_i m_i H(Pt(u'_i), Ps(u_i)) / max(1, Σ_i m_i)   sec. 3.1
    L = λ_CLS L_CLS + λ_MIM L_MIM
    c_patch ← mc c_patch + (1 - mc) mean of the teacher's logits of all patches of the joint batch

One head serves class and patch tokens (sec. 3.2), each with its own centre and its own temperatures of the teacher. A global
view is masked with probability `mask_p`, by a ratio uniform in `mask_ratio` (0.3 ± 0.2), drawn anew for each. The ratio is an
upper bound: a block that would exceed it is not laid, so that the hidden share is a little less, most of all on small grids.

Differences from the paper: those of DINO here. A mask is made of at most BLOCKS tried blocks for all slices at once, where
the authors' code tries until ten in a row do not fit. Temperatures move with every step. The paper trains ViT-S/16 for 800
epochs at a batch of 1024; lr is its 0.0005 · batch / 256 at a batch of 128.
Transfers: the student's encoder. Mask token, head, centres and teacher are dropped.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from medssl.methods import gather, settings
from medssl.methods.dino import DINO, Centre, by_side, cross_entropy, warmed
from medssl.methods.protocol import Batch, Loss, Method, Step, Views

ENCODERS = ("unetr",)

BLOCKS = 20  # tries to lay a block; so many give the hidden share of the authors' law to 0.003 (grids of 4 to 14)
ASPECT = 0.3  # least height over width of a block, and its inverse the greatest


@dataclass(frozen=True, kw_only=True)
class Config(settings.SelfDistillation):
    scale: tuple[float, float] = (0.25, 1.0)
    local_crops: int = 10
    local_scale: tuple[float, float] = (0.05, 0.25)
    prototypes: int = 8192
    teacher_warmup: float = 30 / 800
    freeze_last_layer: float = 1 / 800
    mask_p: float = 0.5  # probability that a global view is masked at all
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # share of its patches that is hidden then, at most
    teacher_patch_temperature: tuple[float, float] = (0.04, 0.07)  # τt of patches, as `teacher_temperature`
    class_weight: float = 1.0  # λ_CLS
    patch_weight: float = 1.0  # λ_MIM

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_ratio[0] <= self.mask_ratio[1] <= 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}: expected 0 < low <= high <= 1")
        if min(self.teacher_patch_temperature) <= 0:
            raise ValueError(f"teacher_patch_temperature is {self.teacher_patch_temperature}: expected more than 0")
        if min(self.class_weight, self.patch_weight) < 0:
            raise ValueError(f"class_weight is {self.class_weight} and patch_weight {self.patch_weight}: expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "adamw"
    lr: float = 2.5e-4  # the paper's 0.0005 · batch / 256
    warmup: float = 10 / 800
    end_lr: float = 1e-6
    weight_decay: float = 0.04
    end_weight_decay: float | None = 0.4
    clip: float | None = 3.0
    epochs: float = 800
    batch: int = 128  # the paper: 1024


class IBOT(DINO):
    """Trains `encoder`, a Vision Transformer: `patch`, `channels`, and `tokens(images, mask, mask_token)`."""

    config: Config
    encoder: Any

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        config = config or Config()
        super().__init__(encoder, config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cast("tuple[int, ...]", encoder.channels)[-1]))
        self.patch_centre = Centre(config.prototypes, config.centre_momentum)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """The views of DINO, and for each of the two global ones which of its patches the student does not see."""
        views = super().augment(batch, rng)
        n, _, *sides = views.images[0].shape
        grid = [-(-side // self.encoder.patch) for side in sides]
        for _ in range(2):
            views.masks.append(draw_masks(n, grid, self.config, rng))
        return views

    def loss(self, views: Views, step: Step) -> Loss:
        whole, *local = by_side(views.images)
        mask = torch.cat(views.masks)
        seen, patches = self.encoder.tokens(whole, mask, self.mask_token)
        y = torch.cat([seen, *(self.encoder.tokens(x)[0] for x in local)])
        with torch.no_grad():
            taught, taught_patches = cast(Any, self.teacher_encoder.network).tokens(whole)
        distillation, watched = self.distil(y, taught, len(views.images), step)
        masked = self.masked(patches, taught_patches, mask, step)
        terms = {"distillation": self.config.class_weight * distillation, "masked": self.config.patch_weight * masked}
        return Loss(terms, watched | {"hidden": mask.float().mean()})

    def masked(self, patches: Tensor, taught: Tensor, mask: Tensor, step: Step) -> Tensor:
        """L_MIM, (), of the patch tokens of student and teacher, (2n, t, f) both, and the mask (2n, t)."""
        temperature = warmed(self.config.teacher_patch_temperature, self.config.teacher_warmup, step)
        targets = self.patch_centre.targets(self.teacher_head(taught.flatten(0, 1)), temperature)
        each = cross_entropy(targets[mask.flatten()], self.head(patches[mask]), self.config.temperature)
        share = (mask / mask.sum(1, keepdim=True).clamp(min=1))[mask]
        return gather.mean((share * each).sum(), len(mask))

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        self.patch_centre.update()


def draw_masks(n: int, grid: list[int], config: Config, rng: Generator) -> Tensor:
    """Which patches are hidden in each of n views, (n, t) bool, t = Π grid in row-major order.

    Every try draws one block for every view and lays it where that hides a patch more and not too many.
    """
    device, t = rng.device, math.prod(grid)
    low, high = config.mask_ratio
    chosen = torch.rand(n, generator=rng, device=device) < config.mask_p
    most = chosen * t * (low + (high - low) * torch.rand(n, generator=rng, device=device))
    mask = torch.zeros(n, *grid, dtype=torch.bool, device=device)
    for _ in range(BLOCKS):
        room = most - mask.flatten(1).sum(1)
        block = draw_blocks(room, grid, rng) & ~mask
        added = block.flatten(1).sum(1)
        fits = (added > 0) & (added <= room)
        mask |= block & fits.view(-1, *[1] * len(grid))
    return mask.flatten(1)


def draw_blocks(room: Tensor, grid: list[int], rng: Generator) -> Tensor:
    """A block of patches in each of n views, (n, *grid) bool; none where the one drawn is as long as a side of the grid.

    room   (n,): its area is uniform between (shortest side // 3)^D and this, before its sides are rounded
    The logarithm of its aspect is uniform; in 3D, that of each axis but the last, and the last makes up for them.
    """
    n, axes, device = len(room), len(grid), room.device
    least = (min(grid) // 3) ** axes
    area = least + (room - least) * torch.rand(n, generator=rng, device=device)
    aspect = (2 * torch.rand(n, axes - 1, generator=rng, device=device) - 1) * -math.log(ASPECT)
    factors = torch.cat([aspect, -aspect.sum(1, keepdim=True)], dim=1) / axes
    sides = (area[:, None] ** (1 / axes) * factors.exp()).round()
    corner = torch.rand(n, axes, generator=rng, device=device)
    block = torch.ones(n, *[1] * axes, dtype=torch.bool, device=device)
    for axis, length in enumerate(grid):
        side = sides[:, axis, None]
        first = (corner[:, axis, None] * (length - side + 1)).floor()
        place = torch.arange(length, device=device)
        inside = (place >= first) & (place < first + side) & (side < length)
        block = block & inside.view(n, *(length if other == axis else 1 for other in range(axes)))
    return block


METHOD: type[Method] = IBOT
