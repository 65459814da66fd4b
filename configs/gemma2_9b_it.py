"""Gemma Scope's SAEs on Gemma 2 9B IT.

    gemma-scope train gemma2_9b_it:SUITE runs/9b_it

SUITE is resid_post_16k (the default) or resid_post_131k, each at layers 9, 20 and 31. Each document is put into the
chat template as a user's turn, and the tokens before the document are masked (section 4.5).

Hardware: 16k on a v5e-16.
Expected at layer 20, 16k: L0 from 14 to 189, depending on λ (the range of the SAEs that Google published).
"""

import ml_collections

from gemma_scope_jax import config

SUITES = {f"resid_post_{width}": (9, 20, 31) for width in ("16k", "131k")}


def get_config(suite: str = "resid_post_16k") -> ml_collections.ConfigDict:
    c = config.gemma_scope("gemma2_9b-it", SUITES, suite)
    c.data.chat_template = True
    return c
