"""Presets: found by listing, built without a word of complaint, and equal to the studies they are named after.

The tables below were typed from the studies (sections A and B of the project's fact sheet), not from the YAML files, and say
every setting that a preset gives: a value that is in a file and not here is a failure.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.platform import config, find
from medssl.platform.errors import UsageError

PRESETS = find.names("preset")


def swin(width: int) -> dict[str, Any]:
    """A.5; four stages of two blocks, windows of 7."""
    sizes = {"width": width, "depths": (2, 2, 2, 2), "heads": 3, "window": 7, "norm": "instance"}
    return {f"network.{key}": value for key, value in ({"name": "swin_unetr"} | sizes).items()}


RESNET = {"network.name": "resnet_unet", "network.layers": 50, "network.width": 64}  # B.3, B.5

CT_CHAIN = {  # A.2
    "zoom": (0.8, 1.2), "zoom_p": 3 / 4,
    "flip_p": 1 / 2, "rot90_p": 1 / 2,
    "intensity_scale": 0.1, "intensity_scale_p": 3 / 4, "intensity_shift": 0.1, "intensity_shift_p": 3 / 4,
    "blur_sigma": (0.25, 1.5), "blur_p": 1 / 4, "noise_std": 0.01, "noise_p": 1 / 4,
}  # fmt: skip

STILL = {"zoom_p": 0, "rot90_p": 0, "blur_p": 0, "noise_p": 0, "flip_p": (0, 0.5)}  # the ACDC study flips columns alone


def pretrain(**values: Any) -> dict[str, Any]:
    return {f"pretrain.{key.replace('__', '.')}": value for key, value in values.items()}


def further(**values: Any) -> dict[str, Any]:
    return {f"further.{key.replace('__', '.')}": value for key, value in values.items()}


def finetune(**values: Any) -> dict[str, Any]:
    return {f"finetune.{key.replace('__', '.')}": value for key, value in values.items()}


def byol(lr: float, **jitter: float) -> dict[str, Any]:
    """B.3, in either variant; learning rate after the rule lr · batch / 256."""
    return RESNET | pretrain(
        name="byol", side=224, crop="resized", iou=None, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3),
        hidden=4096, d=256, predictor_hidden=8192, momentum=0.99, **STILL, **jitter,
        training__optimizer="lars", training__eta=0.02, training__clip_lr=True, training__momentum=0.9,
        training__lr=lr, training__end_lr=0, training__warmup=10 / 401, training__weight_decay=1e-5,
        training__epochs=401, training__batch=128, training__precision="fp16",
    )  # fmt: skip


TABLES: dict[str, dict[str, Any]] = {
    "simsiam-ct": swin(48) | {"network.drop_path": 0.1} | pretrain(  # A.6
        name="simsiam", side=96, crop="fixed", iou=(0.3, 0.6), ends="[]", law="conditional", d=2048, bottleneck=512, **CT_CHAIN,
        training__optimizer="sgd", training__momentum=0.9, training__lr=0.05 * 128 / 256, training__end_lr=1e-6,
        training__warmup=0, training__weight_decay=1e-5, training__epochs=100, training__batch=128, training__accumulate=1,
        training__precision="fp16", training__stop_on_collapse=False,
    ),
    "dino-ct": swin(24) | {"network.drop_path": 0.1} | pretrain(  # A.7, A.10
        name="dino", side=96, crop="fixed", iou=None, local_crops=0, hidden=2048, bottleneck=256, prototypes=1024,
        temperature=0.1, teacher_temperature=(0.04, 0.04), teacher_warmup=0, momentum=0.9995, centre_momentum=0.9,
        freeze_last_layer=1 / 300, **CT_CHAIN,
        training__optimizer="adamw", training__lr=5e-5, training__end_lr=1e-6, training__warmup=10 / 300,
        training__weight_decay=0.04, training__end_weight_decay=0.4, training__clip=3.0, training__epochs=300,
        training__batch=2, training__accumulate=1, training__precision="fp32", training__stop_on_collapse=False,
    ),
    "finetune-ct": swin(48) | finetune(  # A.8
        name="segment", side=96, crops=2, balanced=True, dice_over="slice", freeze_encoder=0, encoder_lr=1.0,
        zoom_p=0, flip_p=0.25, rot90_p=0.25, intensity_scale=0.1, intensity_scale_p=0.15, intensity_shift=0.1,
        intensity_shift_p=0.15, blur_sigma=(0.25, 1.5), blur_p=0.15, noise_std=0.01, noise_p=0.15,
        training__optimizer="adamw", training__betas=(0.9, 0.999), training__lr=1e-3, training__end_lr=5e-5,
        training__warmup=10 / 225, training__weight_decay=1e-5, training__epochs=225, training__batch=32,
        training__precision="fp16", training__evaluations=225,
    ) | {"evaluate.inference": "window", "evaluate.overlap": 0.25, "evaluate.metric": "legacy-slice-dice"},
    "byol-acdc-paper": byol(
        1.0 * 128 / 256, intensity_scale=0.2, intensity_scale_p=0.2, intensity_shift=0.2, intensity_shift_p=0.2
    ),
    "byol-acdc": byol(0.5 * 128 / 256, intensity_scale=0.2, intensity_scale_p=0.8, intensity_shift_p=0),
    "finetune-acdc-resnet50": RESNET | finetune(  # B.5
        name="segment", side=224, crops=1, balanced=False, crop="resized", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3),
        overlap="jaccard", dice_over="batch", dice=1.0, cross_entropy=0, freeze_encoder=0, encoder_lr=1.0, **STILL,
        intensity_scale=0.2, intensity_scale_p=0.2, intensity_shift=0.2, intensity_shift_p=0.2,
        training__optimizer="adam", training__lr=1e-4, training__end_lr=0, training__warmup=10 / 150, training__weight_decay=0,
        training__clip=5.0, training__steps=150 * (1498 // 192), training__batch=192, training__precision="fp16",
        training__evaluations=15,
    ) | {"evaluate.inference": "whole", "evaluate.metric": "dice"},
    "global-local": {"network.name": "unet_chaitanya", "evaluate.inference": "whole"} | pretrain(  # fact sheet global-local.md
        name="global_contrast", strategy="partition-positives", partitions=4, side=192, temperature=0.1,
        training__steps=10_000, training__batch=6 * 4,
    ) | further(
        name="local_contrast", strategy="random", blocks=3, region=3, regions=13, negatives=5, side=192, temperature=0.1,
        training__steps=10_000, training__batch=10,
    ) | finetune(
        name="segment", side=192, crops=1, balanced=False, dice=1.0, cross_entropy=0, zoom_p=0, flip_p=0, rot90_p=0,
        affine_p=4 / 5, elastic_p=0.525, elastic_sigma=5.0, intensity_scale=0.2, intensity_scale_p=0.5, intensity_shift=0.1,
        intensity_shift_p=0.5, blur_p=0, noise_p=0, training__optimizer="adam", training__lr=1e-3, training__end_lr=1e-3,
        training__warmup=0, training__weight_decay=0, training__steps=10_000, training__batch=20,
        training__evaluations=10_000 // 50,
    ),
    "global-local-parity": pretrain(name="global_contrast", pairing="ring", scale="rows")
    | further(name="local_contrast", regions="paper", scale="rows"),
}  # fmt: skip

# Contrast-You, sections 1.11 to 2.6 of its fact sheet
UNET = {"network.name": "unet", "network.width": 16, "network.levels": 5, "network.norm": "batch"}
ACDC = finetune(
    name="segment", side=224, crops=1, balanced=False, dice=0, cross_entropy=1, zoom_p=0, flip_p=0.5, rot90_p=0.25,
    intensity_scale=0.5, intensity_scale_p=1, intensity_shift=0.25, intensity_shift_p=1, blur_p=0, noise_p=0,
    training__optimizer="adam", training__weight_decay=1e-5, training__end_lr=1e-7,
)  # fmt: skip
FED = {f"unlabelled.{key}": value for key, value in {
    "zoom_p": 0, "flip_p": 0.8, "rot90_p": 0, "intensity_scale_p": 0, "intensity_shift_p": 0, "blur_p": 0, "noise_p": 0,
}.items()}  # fmt: skip
BY_LABELS = pretrain(
    name="infonce", side=224, crop="fixed", iou=None, zoom_p=0, flip_p=0.5, rot90_p=0.5, intensity_scale=0.5,
    intensity_scale_p=1, intensity_shift=0.25, intensity_shift_p=1, blur_p=0, noise_p=0, temperature=0.07, partitions=3,
    partition="thirds", hidden=256, d=256,
    training__optimizer="adam", training__lr=2e-4, training__end_lr=1e-7, training__weight_decay=0,
)  # fmt: skip
MI = {"weight": 0.1, "shift": True}
PACE = {"labels": ("partition", "patient", "cycle"), "shares": (1, 0.1, 0.1), "pace": "soft", "gamma": (5, 60), "power": 0.5}


SECOND = further(  # of encoder and decoder, upon the encoder's
    side=224, freeze_encoder=False, intensity_scale=0.5, intensity_scale_p=1, intensity_shift=0.25, intensity_shift_p=1,
    blur_p=0, noise_p=0, training__optimizer="adam", training__lr=2e-4, training__end_lr=1e-7, training__weight_decay=0,
)  # fmt: skip


def run(lr: float, epochs: int, batches: int, batch: int, unlabelled: int | None) -> dict[str, Any]:
    own = finetune(training__lr=lr, training__steps=epochs * batches, training__batch=batch, training__warmup=10 / epochs)
    return UNET | ACDC | own | (FED | {"unlabelled.batch": unlabelled} if unlabelled else {})


def hook(name: str, **values: Any) -> dict[str, Any]:
    return {f"hooks.{name}.{key}": value for key, value in values.items()}


TABLES |= {
    "finetune-acdc-mi-output": run(4e-5, 100, 300, 4, 10) | hook("consistency", weight=5)  # 2.2
    | hook("mutual_information", layers=("output",), shares=(1,), reach=(1,), **MI),
    "finetune-acdc-mi": run(4e-5, 100, 300, 4, 10) | hook("consistency", weight=5)  # 2.3
    | hook("mutual_information", layers=("encoder", "decoder.blocks.2", "decoder"), shares=(1, 0.5, 0.5), reach=(0, 1, 3),
           clusters=20, heads=5, **MI),
    "self-paced-acdc": run(6e-5, 60, 200, 5, 5) | BY_LABELS  # 2.4
    | pretrain(**PACE, corrected=True, training__steps=80 * 200, training__warmup=10 / 80, training__batch=30)
    | SECOND
    | further(name="dense_infonce", temperature=0.07, hidden=256, d=256, grid=10, places=5, zoom_p=0, flip_p=0.8, rot90_p=0,
              training__steps=80 * 200, training__warmup=10 / 80, training__batch=30)
    | hook("self_paced", weight=0.1, partitions=3, partition="thirds", temperature=0.07, corrected=True, **PACE),
    "finetune-acdc-prototypes": run(3e-5, 50, 200, 5, 5) | {"network.width": 32}  # 2.5
    | hook("prototypes", weight=1, per_class=8, information=0.01, orthogonality=1, balance=1, agreement=0),
    "boundary-acdc": run(3e-5, 30, 300, 5, None) | {"network.width": 32} | BY_LABELS  # 2.6
    | pretrain(labels=("partition",), shares=(1,), pace="none", training__steps=50 * 300, training__warmup=10 / 50,
               training__batch=6 * 3)
    | SECOND
    | further(name="boundary_aware", clusters=40, heads=3, hidden=None, redundancy=1, boundary=1, alpha=0.5, balance=1,
              window=5, power=0.75, zoom=(0.8, 1.3), zoom_p=1, flip_p=0.45, rot90_p=0.5,
              training__steps=50 * 300, training__warmup=10 / 50, training__batch=6 * 3),
}  # fmt: skip


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{prefix}.{key}".strip(".")).items()}


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_of_a_preset_is_the_studys(name):
    given = config.read(Path(name))
    built = flat(config.build(given).tree())
    assert {key: built[key] for key in TABLES[name]} == TABLES[name]
    assert flat(given).keys() == TABLES[name].keys()


def test_every_table_has_its_preset():
    assert sorted(TABLES) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is_and_which_data_it_expects(name):
    text = find.path("preset", name).read_text()
    assert find.summary("preset", name)
    assert "https://" in text
    assert "medssl data prepare" in text
    assert max(map(len, text.splitlines())) <= 128


@pytest.mark.parametrize(
    ("pretraining", "finetuning"),
    [("simsiam-ct", "finetune-ct"), ("byol-acdc", "finetune-acdc-resnet50"), ("byol-acdc-paper", "finetune-acdc-resnet50")],
)
def test_a_studys_presets_stack_in_either_order(pretraining, finetuning):
    layers = [config.read(Path(name)) for name in (pretraining, finetuning)]
    assert config.stack(layers) == config.stack(layers[::-1])
    tree = config.build(config.stack(layers)).tree()
    both = TABLES[finetuning] | TABLES[pretraining]
    assert {key: flat(tree)[key] for key in both} == both


def test_dino_fine_tunes_at_its_own_width_when_named_last():
    experiment = config.build(config.stack([config.read(Path(name)) for name in ("finetune-ct", "dino-ct")]))
    assert experiment.network.settings.width == 24


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("finetune")])
def test_a_presets_chain_makes_views_of_its_side(name):
    given = config.read(Path(name))
    sides = {section: {"side": 96} for section in ("pretrain", "further") if section in given}  # where the file has none
    experiment = config.build(config.stack([sides, given]))
    batch = {"image": torch.randint(0, 256, (2, 1, 240, 230), dtype=torch.uint8), "size": torch.tensor([[240, 230]] * 2)}
    batch |= {"position": torch.tensor([0.0, 1.0]), "volume": torch.arange(2)}
    for part in (experiment.pretrain, experiment.further):
        if part is None:
            continue
        method = find.load("method", part.name).METHOD
        subject = torch.nn.Conv2d(1, 4, 3)
        subject.channels = (4,)  # type: ignore[assignment]
        if part is experiment.further:
            networks = find.load("network", experiment.network.name)
            small = networks.Config(**({"width": 4} if experiment.network.name == "unet" else {}))
            subject = networks.NETWORK(1, 2, small)  # type: ignore[assignment]
        views = method(subject, part.settings).augment(batch, torch.Generator().manual_seed(0))
        assert [tuple(images.shape) for images in views.images] == [(2, 1, part.settings.side, part.settings.side)] * 2


def test_parity_is_put_after_the_recipe_and_changes_the_losses_alone():
    layers = [config.read(Path(name)) for name in ("global-local", "global-local-parity")]
    tree = flat(config.build(config.stack(layers)).tree())
    expected = TABLES["global-local"] | TABLES["global-local-parity"]
    assert {key: tree[key] for key in expected} == expected


def test_a_fine_tuning_presets_chain_makes_labelled_views_of_its_side():
    for name in ("finetune-ct", "finetune-acdc-resnet50"):
        config_ = config.build(config.read(Path(name))).finetune.settings
        batch = {
            "image": torch.randint(0, 256, (2, 1, 240, 230), dtype=torch.uint8),
            "label": torch.randint(0, 4, (2, 240, 230), dtype=torch.uint8),
            "size": torch.tensor([[240, 230]] * 2),
        }
        views = (
            find.load("method", "segment").METHOD(torch.nn.Identity(), config_).augment(batch, torch.Generator().manual_seed(0))
        )
        shape = (2 * config_.crops, config_.side, config_.side)
        assert (views.images[0][:, 0].shape, views.labels.shape) == (shape, shape)


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r'no preset "simsiam-tc" in methods/presets/; did you mean simsiam-ct\?'):
        config.read(Path("simsiam-tc"))


def test_a_file_goes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("simsiam-ct").write_text("seed: 3\n")
    assert config.read(Path("simsiam-ct")) == {"seed": 3}


def test_presets_are_in_the_package():
    import tomllib

    files = tomllib.loads((find.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["medssl"]
    packaged = {file for pattern in files for file in find.ROOT.glob(pattern)}
    assert {find.path("preset", name) for name in PRESETS} <= packaged
