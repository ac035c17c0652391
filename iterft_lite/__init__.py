"""iterft_lite: iterated finetuning on one GPU (or two CPU cores).

A model is seeded with a trait, writes data, the next model is trained on that data, and a judge scores trait and
coherence; then again. The science is arXiv 2605.01130, "Iterative Finetuning is Mostly Idempotent".
"""

__version__ = "0.1.0"
