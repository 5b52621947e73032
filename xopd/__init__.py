"""xopd: a thin trainer for cross-modal on-policy distillation of speech language models.

It imports ``xopd_kernels`` for everything that touches the vocabulary; never the other way round.
"""
