"""Gemma Scope's SAEs on Gemma 2 9B.

    gemma-scope train gemma2_9b:SUITE runs/9b

SUITE is a site and a width. The suites with all 42 layers are resid_post, mlp_out and attn_out, each with 16k and
131k latents; resid_post_16k is the default. On the residual stream there are also 32k, 65k, 262k and 524k at layer
20, and 1m at layers 9, 20 and 31.

Hardware: layer 20 of 131k (`--banks.main.layers 20`) on a v5p-16 or v6e-16; results/tpu.json has the memory that it
needs on each chip.
The text is C4, because Google's training text is not public.
Expected at layer 20, residual stream, 131k: L0 from 11 to 276, depending on λ (the range of the SAEs that Google
published).
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
