"""Every known value of Contrast-You (https://github.com/jizongFox/Contrast-You), by our functions; none is left out."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.methods import agreement, clusters, infonce, optimizers
from medssl.methods.hooks import boundary_aware, information_maximisation, prototypes
from medssl.methods.hooks.mean_teacher import follow
from medssl.methods.hooks.uncertainty_mean_teacher import among_sure, bound
from medssl.methods.protocol import Step
from medssl.methods.settings import Training
from medssl.methods.teacher import Teacher
from medssl.platform import metrics

KNOWN = json.loads((Path(__file__).parents[1] / "known_contrastyou.json").read_text())
GIVEN = {  # what the values are computed from
    "iic_global": {"x", "y", "identical_onehot_check/x"},
    "iic_local": {"x", "y", "padding"},
    "iic_local_patches": {"x", "y", "padding", "patch"},
    "supcon": {"z1", "z2", "labels", "tau0.07_instance_labels(SimCLR)/labels"},
    "self_paced": {"gamma_schedule/b", "gamma_schedule/e", "gamma_schedule/T"},
    "multi_prototype": {"classes", "prototypes_per_class", "W", "features", "features_of_transformed_image", "T", "target"},
    "boundary_cross_correlation": {"image", "q1", "q2"},
    "imsat": {"p"},
    "consistency": {"prob_tf", "tf_prob"},
    "ema": {"alpha", "wd", "teacher0", *(f"trace/{n}/{key}" for n in range(4) for key in ("step", "alpha", "student"))},
    "uamt": {"C", "entropy_map", "squared_error_mean_over_classes"},
    "dice_per_scan": {"pred", "target", "groups"},
    "lr_schedule": {"closed_form", "rtol"},
}
Values = dict[str, Any]


def of(*path: str) -> Tensor:
    value = KNOWN
    for key in path:
        value = value[key]
    return torch.tensor(value, dtype=torch.float64)


def iic_global() -> Values:
    x, y = of("iic_global", "x").requires_grad_(), of("iic_global", "y")
    p = clusters.joint(x[None], y[None])
    loss = clusters.negative_information(p)[0]
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    eye = of("iic_global", "identical_onehot_check", "x")[None]
    return {
        "joint": p[0],
        "marginal": p[0].sum(1),
        "loss_lam1": loss,
        "mutual_information": -loss,
        "loss_lam1.5": clusters.negative_information(p, 1.5)[0],
        "identical_onehot_check/loss": clusters.negative_information(clusters.joint(eye, eye))[0],
        "gradient_lam1_wrt_x[0,0]": gradient[0, 0],
    }


def iic_local() -> Values:
    x, y = of("iic_local", "x").requires_grad_(), of("iic_local", "y")
    a, b = x[None], y[None]
    counts = clusters.displaced(a, b, 1)
    shifted = clusters.normalised(counts - counts.detach().min() + 1e-16)
    loss = clusters.local_information(a, b, 1, shift=True)[0]
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    flat = {"tiny": 1e-5}
    head = {
        symmetric: clusters.normalised(counts - counts.detach().min() + 1e-16, symmetric)[:, 0] / 9
        for symmetric in (False, True)
    }
    return {
        "joint_centre_uv11": shifted[4, 0],
        "joint_corner_uv00": shifted[0, 0],
        "loss_per_displacement": clusters.negative_information(shifted, tiny=1e-16).view(3, 3),
        "loss": loss,
        "loss_without_min_shift": clusters.local_information(a, b, 1),
        "loss_padding0": clusters.local_information(a, b, 0, shift=True),
        "loss_padding0_no_min_shift": clusters.local_information(a, b, 0),
        "loss_lam1.5": clusters.local_information(a, b, 1, 1.5, shift=True),
        "gradient_padding1_wrt_x[0,0,1,1]": gradient[0, 0, 1, 1],
        # that code's slip of dividing twice, by which every displacement's joint sums to 1/9
        "head_2023_variants/padding1_sym_false": clusters.negative_information(head[False], **flat).mean(),
        "head_2023_variants/padding1_sym_true": clusters.negative_information(head[True], **flat).mean(),
        "head_2023_variants/padding0_joint": clusters.joint(a, b, symmetric=False)[0],
        "head_2023_variants/padding0_sym_false": clusters.local_information(a, b, 0, symmetric=False, **flat),
        "head_2023_variants/padding0_sym_true": clusters.local_information(a, b, 0, **flat),
    }


def iic_local_patches() -> Values:
    x, y = of("iic_local_patches", "x")[None], of("iic_local_patches", "y")[None]
    each = [
        clusters.local_information(x[(..., *where)], y[(..., *where)], 1, shift=True)
        for where in clusters.windows(x.shape[3:], 4)
    ]
    whole = clusters.local_information(x, y, 1, shift=True, patch=4)
    return {"starts": torch.tensor(clusters.starts(6, 4)), "step": torch.tensor(2), "per_patch": torch.cat(each), "loss": whole}


def contrasted(tau: float = 0.07, labels: list[int] | None = None, rivals: Any = "all") -> tuple[Tensor, Tensor]:
    z = [of("supcon", "z1"), of("supcon", "z2")]
    return infonce.contrast(z, torch.tensor(labels or KNOWN["supcon"]["labels"]), tau, rivals)


def per_anchor(each: Tensor, positives: Tensor) -> Tensor:
    return torch.stack([row[seen].mean() for row, seen in zip(each, positives, strict=True)])


def supcon() -> Values:
    each, positives = contrasted()
    alone = contrasted(labels=[0, 1, 2, 3])
    warm = contrasted(0.5)
    return {
        "tau0.07/ell": each,
        "tau0.07/per_anchor": per_anchor(each, positives),
        "tau0.07/loss": infonce.averaged(each, positives),
        "tau0.07_instance_labels(SimCLR)/per_anchor": per_anchor(*alone),
        "tau0.07_instance_labels(SimCLR)/loss": infonce.averaged(*alone),
        "tau0.5/per_anchor": per_anchor(*warm),
        "tau0.5/loss": infonce.averaged(*warm),
        "num_positive_pairs": positives.sum(),
        "exclude_other_positives_loss_tau0.07": infonce.averaged(*contrasted(rivals="negatives")),
    }


def self_paced() -> Values:
    each, positives = contrasted()
    values: Values = {}
    for case in KNOWN["self_paced"]["cases"]:
        pace, limit = case.split("_gamma")
        weights = infonce.paced(each, pace, float(limit))
        values |= {
            f"cases/{case}/mean_weight_on_positives": infonce.mean_weight(weights, positives),
            f"cases/{case}/weights_row0_all_columns": weights[0],
            f"cases/{case}/loss": infonce.averaged(each, positives, weights),
            f"cases/{case}/loss_correct_grad": infonce.averaged(each, positives, weights, corrected=True),
        }
    schedule = KNOWN["self_paced"]["gamma_schedule"]
    for name in ("p0.5", "p1", "p2"):
        for epoch in schedule[name]:
            ends, power = (schedule["b"], schedule["e"]), float(name[1:])
            values[f"gamma_schedule/{name}/{epoch}"] = torch.tensor(infonce.gamma(ends, power, int(epoch) / schedule["T"]))
    z = of("supcon", "z1").requires_grad_()
    each, positives = infonce.contrast([z, of("supcon", "z2")], torch.tensor(KNOWN["supcon"]["labels"]), 0.07)
    held, free = infonce.paced(each, "soft", 3.0), (1 - each / 3.0).clamp(min=0)
    for name, weights in (("correct", held), ("wrong", free)):
        (gradient,) = torch.autograd.grad(infonce.averaged(each, positives, weights), z, retain_graph=True)
        values[f"gradient_soft_gamma3_wrt_z1_row0/{name}"] = gradient[0]
    for name, value in KNOWN["self_paced"]["gradient_soft_gamma3_wrt_z1_row0"].items():
        # published for rows that are free to change their length; ours are brought to length 1, which takes that part away
        free_row, unit = torch.tensor(value, dtype=torch.float64), z.detach()[0]
        tangent = free_row - (free_row @ unit) * unit
        torch.testing.assert_close(values[f"gradient_soft_gamma3_wrt_z1_row0/{name}"], tangent, rtol=1e-6, atol=1e-6)
        values[f"gradient_soft_gamma3_wrt_z1_row0/{name}"] = free_row
    return values


def multi_prototype() -> Values:
    w, features, moved = (of("multi_prototype", key) for key in ("W", "features", "features_of_transformed_image"))
    log_q, target = prototypes.answers(features, w), torch.tensor(KNOWN["multi_prototype"]["target"])
    log_p = prototypes.class_log_probabilities(log_q, 2)
    sup = nn.functional.cross_entropy(log_p, target)
    q, other = log_q.exp().flip(-1), prototypes.answers(moved, w).exp()
    p = clusters.joint(other[None], q[None], symmetric=False)
    mi, orth = clusters.negative_information(p, tiny=1e-5)[0], prototypes.orthogonality(w)
    cons = agreement.squared_error(q, other).mean()
    unit = nn.functional.normalize(w, dim=1)
    return {
        "q": log_q.exp(),
        "class_probs": log_p.exp(),
        "sup_loss": sup,
        "mi_joint": p[0],
        "mi_loss": mi,
        "gram": unit @ unit.T,
        "orth_loss": orth,
        "consistency_loss": cons,
        "total_mi0.01_orth1_cons0.1": sup + 0.01 * mi + orth + 0.1 * cons,
    }


def boundary_cross_correlation() -> Values:
    image, q1, q2 = (of("boundary_cross_correlation", key) for key in ("image", "q1", "q2"))
    entropy = [boundary_aware.entropies(q) for q in (q1, q2)]

    def edge(power: float) -> Tensor:
        return boundary_aware.edges(image, power, border="circular")

    values: Values = {
        "edge_map_power0.75": edge(0.75),
        "entropy_map_q1": entropy[0],
        "cc_map_q1_win3_power0.75": boundary_aware.cross_correlation(entropy[0], edge(0.75), 3)[0],
    }
    for window, power in ((3, 0.75), (5, 0.75), (3, 0.5)):
        losses = [-boundary_aware.cross_correlation(each, edge(power), window)[0].mean() for each in entropy]
        name = f"losses/win{window}_power{power}"
        values |= {f"{name}/loss_q1": losses[0], f"{name}/loss_q2": losses[1], f"{name}/loss": sum(losses) / 2}
    flat, told = boundary_aware.cross_correlation(torch.ones(1, 1, 6, 6).double(), torch.ones(1, 1, 6, 6).double() * 0, 3)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert not told[inner].any()  # such windows count nowhere here
    return values | {"constant_input_check/loss": -flat[inner].mean()}


def redundancy() -> Values:
    q1, q2 = of("boundary_cross_correlation", "q1").requires_grad_(), of("boundary_cross_correlation", "q2")
    p = clusters.joint(q1[None], q2[None])
    values: Values = {"joint": p[0]}
    for case in KNOWN["redundancy_reduction"]["cases"]:
        alpha, balance = (float(part.lstrip("alphm")) for part in case.split("_"))
        values[f"cases/{case}"] = clusters.reduced(p, alpha, balance)[0]
    counts = clusters.displaced(q1[None], q2[None], 0)[0] / q1[:, 0].numel()  # by the number of pixels, not by their sum
    p = (counts + counts.mT) / 2
    for name, attached in (("target_attached(public code)", True), ("target_detached", False)):
        (gradient,) = torch.autograd.grad(clusters.reduced(p, 0.5, 1.0, attached)[0], q1, retain_graph=True)
        values[f"gradient_alpha0.5_lam1_wrt_q1[0,0,0,0]/{name}"] = gradient[0, 0, 0, 0]
    return values


def imsat() -> Values:
    logits = of("imsat", "p").log()[..., None]
    sure, used = information_maximisation.entropies(logits, torch.ones(5, 1, dtype=torch.bool))
    balance, balances, losses = torch.tensor(1.0, dtype=torch.float64), [], []
    for _ in range(3):
        balances.append(balance)
        losses.append(sure - balance * used)
        balance = balance + information_maximisation.raised(math.log(4) - used)
    return {
        "marginal_entropy": used,
        "conditional_entropy": sure,
        "loss_lam1": sure - used,
        "loss_lam5": sure - 5 * used,
        "dynamic_weight/w_sequence_3_calls": torch.stack(balances),
        "dynamic_weight/loss_sequence": torch.stack(losses),
    }


def consistency() -> Values:
    a, b = of("consistency", "prob_tf"), of("consistency", "tf_prob")
    return {
        "mse": agreement.squared_error(a, b).mean(),
        "kl_criterion(prob=a,target=b)=KL(b||a)": agreement.divergence(b, a.log()).mean(),
        "entropy_min(a)": agreement.entropy(a.log()).mean(),
        "pseudo_label_mse(a)": agreement.squared_error(a, agreement.hardened(a)).mean(),
        "hard_clip_mean_teacher_mse(teacher=a,student=b)": agreement.squared_error(agreement.hardened(a), b).mean(),
    }


def ema() -> Values:
    known, student = KNOWN["ema"], nn.Linear(1, 1, bias=False).double()
    student.weight.data.fill_(known["teacher0"])
    teacher, values = Teacher(student), {}
    for index, row in enumerate(known["trace"]):
        student.weight.data.fill_(row["student"])
        follow(teacher, student, known["alpha"], known["wd"], Step(index, 10))
        values[f"trace/{index}/teacher"] = teacher.network.weight.detach()[0, 0].clone()
    return values


def uamt() -> Values:
    entropy, distance = of("uamt", "entropy_map"), of("uamt", "squared_error_mean_over_classes")
    values: Values = {}
    for case in KNOWN["uamt"]["cases"]:
        epoch, epochs = (int(part) for part in case.removeprefix("epoch").split("of"))
        limit = bound(KNOWN["uamt"]["C"], "linear", epoch / epochs)
        sure = entropy < limit
        values |= {f"cases/{case}/threshold": torch.tensor(limit), f"cases/{case}/mask": sure}
        values[f"cases/{case}/loss"] = among_sure(distance, sure, torch.ones_like(sure))
    return values


def dice_per_scan() -> Values:
    known = KNOWN["dice_per_scan"]
    predicted, actual, scans = (np.array(known[key]) for key in ("pred", "target", "groups"))
    by_scan = {  # ids moved up by one, so that the background counts as a class
        scan: metrics.dice(torch.tensor(predicted[scans == scan] + 1), torch.tensor(actual[scans == scan] + 1), 4).nan_to_num(1)
        for scan in ("s1", "s2")
    }
    mean = torch.stack([*by_scan.values()]).mean(0)
    values = {f"dice_by_scan_class0_1_2/{scan}": each for scan, each in by_scan.items()}
    return values | {"DSC1": mean[1], "DSC2": mean[2], "DSC_mean(foreground)": mean[1:].mean()}


def slice_partition() -> Values:
    values = {}
    for name, rule, parts in (
        ("acdc_n10", "thirds", 3),
        ("acdc_n7", "thirds", 3),
        ("prostate_P8_n20", "blocks", 8),
        ("mmwhs_P5_n23", "blocks", 5),
    ):
        depth = int(name.rpartition("n")[2])
        position = torch.arange(depth) / (depth - 1)
        values[name] = infonce.by_height(position, torch.full((depth,), depth), parts, rule)
    return values


def lr_schedule() -> Values:
    """Theirs begins its warm-up at the base rate, ours at 0: the difference is what is added here."""
    values = {}
    for name in KNOWN["lr_schedule"]:
        if not name.startswith("base"):
            continue
        base, times, warm, epochs = _schedule(name)
        training = Training(lr=base * times, end_lr=1e-7, warmup=warm / epochs)
        for epoch in map(int, KNOWN["lr_schedule"][name]):
            rising = epoch - 1 <= warm
            ours = optimizers.learning_rate(training, epoch - 1 if rising else epoch - 2, int(epochs))
            values[f"{name}/{epoch}"] = torch.tensor(ours + (base * (1 - (epoch - 1) / warm) if rising else 0))
    return values


def _schedule(name: str) -> tuple[float, ...]:
    base, times, warm, epochs = name.removeprefix("base").split("_")
    return float(base), float(times[1:]), float(warm[1:]), float(epochs[1:])


SECTIONS: Mapping[str, Callable[[], Values]] = {
    "iic_global": iic_global,
    "iic_local": iic_local,
    "iic_local_patches": iic_local_patches,
    "supcon": supcon,
    "self_paced": self_paced,
    "multi_prototype": multi_prototype,
    "boundary_cross_correlation": boundary_cross_correlation,
    "redundancy_reduction": redundancy,
    "imsat": imsat,
    "consistency": consistency,
    "ema": ema,
    "uamt": uamt,
    "dice_per_scan": dice_per_scan,
    "slice_partition": slice_partition,
    "lr_schedule": lr_schedule,
}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every value by its path; a list of numbers is one value."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(index): row for index, row in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, below in value.items():
        found |= leaves(below, f"{path}/{key}" if path else key)
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_known_value_is_ours(section):
    ours = SECTIONS[section]()
    given = GIVEN.get(section, set())
    theirs = {
        path: value
        for path, value in leaves(KNOWN[section]).items()
        if path not in given and isinstance(value, list | float | int)
    }
    texts = {path for path, value in leaves(KNOWN[section]).items() if isinstance(value, str)}
    assert ours.keys() == theirs.keys()
    assert texts <= given | {path for path in texts if path.endswith(("note", "rule", "formula"))}
    rtol = KNOWN["lr_schedule"]["rtol"] if section == "lr_schedule" else 1e-6
    for path, value in theirs.items():
        expected = torch.tensor(value, dtype=torch.float64)
        found = torch.as_tensor(ours[path]).detach().double().reshape(expected.shape)
        torch.testing.assert_close(
            found,
            expected,
            rtol=rtol,
            atol=1e-6 if section != "lr_schedule" else 1e-10,
            msg=lambda text, path=path: f"{path}: {text}",
        )


def test_no_section_is_left_out():
    assert SECTIONS.keys() == KNOWN.keys()
