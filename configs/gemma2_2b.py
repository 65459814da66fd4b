"""Gemma Scope's SAEs on Gemma 2 2B.

    python train.py --config=configs/gemma2_2b.py:SUITE --workdir=runs/2b

SUITE is a site and a width: resid_post_16k (the default), mlp_out_16k, attn_out_65k, … at all 26 layers, and on the
residual stream of layer 12 also 32k, 131k, 262k and 524k, of layers 5, 12 and 19 1m. Any can be had at fewer layers:
`--config.banks.main.layers='(12,)'`.

Hardware: one layer of 16k on a v5e-8; all layers of 16k on a v5p-32 with --config.mesh.data=2. What they need of each
chip is in results/tpu.json.
Expected at layer 12, residual stream, 16k, over λ: L0 from 22 to 445 (those of the SAEs that Google published).
"""

import ml_collections

from gemma_scope_jax import config

ALL = tuple(range(26))
SUITES = {
    **{f"{site}_{width}": ALL for site in ("resid_post", "mlp_out", "attn_out") for width in ("16k", "65k")},
    **{f"resid_post_{width}": (12,) for width in ("32k", "131k", "262k", "524k")},
    "resid_post_1m": (5, 12, 19),
}


def get_config(suite: str = "resid_post_16k") -> ml_collections.ConfigDict:
    return config.gemma_scope("gemma2_2b", SUITES, suite)
