"""Does every method train a Vision Transformer? As `methods_short.py`, on a small UNETR: tokens of 96, patches of 8 pixels.

Every method of `methods_vit.py`. MAE hides the Transformer's own patches and has a small decoder of the paper's. DINO and iBOT
go without local views and with a sharper teacher, see `methods_short.py`. Views want 6 patches per side: `-o pretrain.side=48`.
"""

from typing import Any

from medssl.search_spaces import methods_short, methods_vit

QUESTION = "Does every pretraining of a small UNETR train within a few hundred steps, and is any better than from scratch?"
CONTROL = methods_vit.CONTROL
DEFAULTS = methods_short.DEFAULTS | methods_short.UNETR | {"network.grid": 6}
PAIRED = ("barlow_twins", "byol", "iic", "moco", "simclr", "simsiam", "vicreg")  # whose boxes would be larger than small slices
RESIZED = {name: methods_short.SIZES[name] | {"crop": "resized"} for name in PAIRED}
SIZES = (
    methods_short.SIZES
    | RESIZED
    | {
        "mae": {"d": 64, "depth": 2, "heads": 4},
        "dino": methods_short.SHARP,
        "ibot": methods_short.IBOT,
    }
)


def arms() -> dict[str, dict[str, Any]]:
    return {name: settings | methods_short.sized(SIZES.get(name, {})) for name, settings in methods_vit.arms().items()}
