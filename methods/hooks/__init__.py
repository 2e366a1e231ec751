"""Semi-supervised ideas as terms that any fine-tuning can stack: `medssl finetune --hook NAME`.

A hook is one file: a docstring with its paper and equations, a `Config` (a `settings.Hook`), and `HOOK = TheClass`, a module
that meets the protocol `Hook` of methods/segment.py. Letters of the docstrings: f the network, x an unlabelled crop, T a random
geometry, p = softmax f, m crops, K classes; means are over valid pixels, those that T shows and that are slice.
"""
