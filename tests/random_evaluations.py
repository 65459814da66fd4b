"""Evaluations with random numbers, for tests of tables, plots and pages."""

import dataclasses

import numpy as np

from gemma_scope_jax.saes import evaluation_file


def evaluation(seed=0):
    """An evaluation with random numbers."""
    rng = np.random.default_rng(seed)
    made = {field.name: float(rng.random()) for field in dataclasses.fields(evaluation_file.Evaluation)}
    del made["more"]
    return evaluation_file.Evaluation(
        **made
        | {
            "rows": 4, "activations": 1020, "tokens": 1016, "l0_quantiles": (1, 2, 3, 4, 5),
            "kl": None, "kl_se": None,
            "l0_counts": rng.integers(9, size=20),
            "by_position": {name: rng.random(16) for name in ("l0", "error", "delta_loss", "activations", "tokens")},
            **{n: rng.random(64) for n in ("frequency", "nearest_cosine", "threshold", "encoder_norm")},
            "decoder_norm": np.ones(64) + 1e-7 * rng.random(64),
        }
    )  # fmt: skip


ABOUT = {
    "model": "gemma3_270m", "text": "<sotu & co>", "text_trained_on": "<i>", "is_other_text": True,
    "split": "held_out", "context_length": 256,
}  # fmt: skip
