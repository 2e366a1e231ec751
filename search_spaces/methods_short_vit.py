"""Does every method train a Vision Transformer? As `methods_short.py`, on a small UNETR: tokens of 96, patches of 8 pixels.

Every method of `methods_vit.py`, iBOT included. MAE hides the Transformer's own patches and has a small decoder of the paper's.
DINO and iBOT go without local views, which would be a few patches, and with a sharper teacher whose centre is the mean of the
batch at hand: young class tokens lie close together, and at a temperature of 0.04, or with a centre that lags, targets became
uniform within 10 steps and stayed so. Views want 6 patches per side: `-o pretrain.side=48`.
"""

from typing import Any

from medssl.search_spaces import methods_short, methods_vit

QUESTION = "Does every pretraining of a small UNETR train within a few hundred steps, and is any better than from scratch?"
CONTROL = methods_vit.CONTROL
DEFAULTS = {name: value for name, value in methods_short.DEFAULTS.items() if not name.startswith("network.")} | {
    "network.name": "unetr",
    "network.patch": 8,
    "network.d": 96,
    "network.depth": 4,
    "network.heads": 4,
    "network.width": 8,
    "network.grid": 6,
}
SHARP: dict[str, Any] = {"teacher_temperature": (0.02, 0.02), "centre_momentum": 0.0}
PAIRED = ("barlow_twins", "byol", "iic", "moco", "simclr", "simsiam", "vicreg")  # whose boxes would be larger than small slices
RESIZED = {name: methods_short.SIZES[name] | {"crop": "resized"} for name in PAIRED}
SIZES = (
    methods_short.SIZES
    | RESIZED
    | {
        "mae": {"d": 64, "depth": 2, "heads": 4},
        "dino": methods_short.SIZES["dino"] | SHARP | {"local_crops": 0},
        "ibot": methods_short.SIZES["dino"] | SHARP | {"teacher_patch_temperature": (0.02, 0.02), "local_crops": 0},
    }
)


def arms() -> dict[str, dict[str, Any]]:
    return {name: settings | methods_short.sized(SIZES.get(name, {})) for name, settings in methods_vit.arms().items()}
