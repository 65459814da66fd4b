"""Gemma Scope's SAEs on Gemma 2 27B.

    gemma-scope train gemma2_27b runs/27b

Gemma Scope has one suite for this model: 131k latents on the residual stream of layers 10, 22 and 34.

Hardware: a v5p-32 or larger; `gemma-scope plan` prints the memory that the run needs on each chip.
The text is C4, because Google's training text is not public.
Expected at layer 22: L0 from 20 to 290, depending on λ (the range of the SAEs that Google published).
"""

import ml_collections

from gemma_scope_jax import config

SUITES = {"resid_post_131k": (10, 22, 34)}


def get_config(suite: str = "resid_post_131k") -> ml_collections.ConfigDict:
    return config.gemma_scope("gemma2_27b", SUITES, suite)
