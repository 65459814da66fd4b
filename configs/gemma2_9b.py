"""Gemma Scope's SAEs on Gemma 2 9B.

    gemma-scope train gemma2_9b:SUITE runs/9b

SUITE is a site and a width: resid_post_16k (the default), mlp_out_131k, … at all 42 layers, and on the residual
stream of layer 20 also 32k, 65k, 262k and 524k, of layers 9, 20 and 31 1m.

Hardware: layer 20 of 131k (--banks.main.layers 20) on a v5p-16 or v6e-16. What it needs of each chip is
in results/tpu.json. The text is C4, which is open; Google's own is not.
Expected at layer 20, residual stream, 131k, over λ: L0 from 11 to 276 (those of the SAEs that Google published).
"""

import ml_collections

from gemma_scope_jax import config

ALL = tuple(range(42))
SUITES = {
    **{f"{site}_{width}": ALL for site in ("resid_post", "mlp_out", "attn_out") for width in ("16k", "131k")},
    **{f"resid_post_{width}": (20,) for width in ("32k", "65k", "262k", "524k")},
    "resid_post_1m": (9, 20, 31),
}


def get_config(suite: str = "resid_post_16k") -> ml_collections.ConfigDict:
    return config.gemma_scope("gemma2_9b", SUITES, suite)
