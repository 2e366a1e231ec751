"""The methods, one file per paper, in plain PyTorch: this folder runs without Ray and without the rest of medssl.

Every method answers the four verbs of `protocol.py`: `augment` draws all chance of a step, `loss` is deterministic given
the views, `after_step` follows the optimizer, `transferable_state` says what fine-tuning receives.
"""
