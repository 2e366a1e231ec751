"""Which self-supervised method for a Vision Transformer?

As `methods.py`, on UNETR: every method of methods/, those included that train no other encoder than its Vision Transformer, and
against UNETR from scratch.
"""

from typing import Any

from medssl.search_spaces import methods

QUESTION = (
    "Which pretraining of UNETR's Vision Transformer makes the best segmentation, and does any beat training from scratch?"
)
CONTROL = methods.CONTROL
DEFAULTS = {"network.name": "unetr"}
METHODS = (*methods.METHODS, "ibot")


def arms() -> dict[str, dict[str, Any]]:
    return methods.arms() | {"ibot": {"pretrain.name": "ibot"}}


def suggest(trial: Any) -> dict[str, Any]:
    return {"pretrain.name": trial.suggest_categorical("method", METHODS)}
