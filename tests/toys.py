"""A random SAE, and rows in memory."""

import numpy as np

from gemma_scope_jax.data import token_rows
from gemma_scope_jax.saes import jumprelu


class Rows:
    """Rows in memory instead of a dataset on disk."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, indices: np.ndarray) -> token_rows.Batch:
        """Returns the rows at some indices."""
        return token_rows.Batch(self.tokens[indices], np.asarray(indices), np.zeros(len(indices), np.int32))


def random_sae(seed: int = 0) -> jumprelu.SAE:
    """A random SAE of 64 latents on activations of width 32; only some of its latents fire."""
    rng = np.random.default_rng(seed)
    arrays = dict(
        W_enc=rng.normal(size=(32, 64)), b_enc=rng.normal(size=64), threshold=2 + rng.random(64),
        W_dec=0.2 * rng.normal(size=(64, 32)), b_dec=rng.normal(size=32),
    )  # fmt: skip
    return jumprelu.SAE(**{k: v.astype(np.float32) for k, v in arrays.items()})
