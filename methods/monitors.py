"""Numbers that show whether representations are alive: one forward pass of the loss can fall while all slices become one.

All take rows (n, d), detach them, and cost little beside a training step: spread and collapse are a few passes over n·d
numbers; the effective rank is one product and the eigenvalues of a matrix of at most ROWS x ROWS. Together 4 ms on one
CPU core for 128 predictions of 2048 and features of 512. With several workers each sees its own shard; the loop averages.
With fewer than two rows they are NaN: undefined.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128  # rows that enter the effective rank at most; its cost grows with their cube


def spread(x: Tensor) -> Tensor:
    """√d times the deviation over the batch of unit-length rows, mean over the d columns.

    1 when rows point everywhere alike (the deviation of a random unit vector's entry is 1/√d), 0 when all point one way.
    Chen and He 2021, sec. 4.1 and figure 2, https://arxiv.org/abs/2011.10566.
    """
    x = x.detach().float()
    if len(x) < 2:
        return x.new_tensor(torch.nan)
    return F.normalize(x, dim=1).std(dim=0).mean() * x.shape[1] ** 0.5


def collapse(x: Tensor) -> Tensor:
    """max(0, 1 - spread): 0 spread out, 1 collapsed. The index of the CT study, for any d.

    Meaningless behind a normalisation over the batch, which spreads whatever it is given.
    """
    return (1 - spread(x)).clamp(min=0)


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of x: how many directions the rows use, in [1, min(n, d)].

    Roy and Vetterli, EUSIPCO 2007; as a measure of representations RankMe, Garrido et al. 2023,
    https://arxiv.org/abs/2210.02885. Rows are not centred: of identical rows it is 1. Taken from the Gram matrix of the
    first ROWS rows, in float64 since its eigenvalues are the squares of the singular values. The eigenvalues make the
    host wait for an accelerator: ask for them now and then.
    """
    x = x.detach()[:ROWS].double()
    if len(x) < 2:
        return x.new_tensor(torch.nan).float()
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    return torch.special.entr(share).sum().exp().float()
