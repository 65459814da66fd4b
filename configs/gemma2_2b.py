"""Gemma Scope's SAEs on Gemma 2 2B.

    gemma-scope train gemma2_2b:SUITE runs/2b

SUITE is a site and a width: resid_post_16k (the default), mlp_out_16k, attn_out_65k, … at all 26 layers, and on the
residual stream of layer 12 also 32k, 131k, 262k and 524k, of layers 5, 12 and 19 1m. Any can be had at fewer layers:
`--banks.main.layers 12`. Two more are of several banks or of transcoders:

  all_16k         residual stream, MLP and attention of all 26 layers in one run: 78 SAEs from one forward pass
  transcoder_16k  the MLP of all 26 layers, as in appendix B

Hardware: one layer of 16k on a v5e-8; all layers of 16k, also of all three sites, on a v5p-32.
`gemma-scope plan` says what any of them needs; results/tpu.json has some. The text is C4, which is
open; Google's own is not.
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
    if suite == "all_16k":
        c = config.gemma_scope("gemma2_2b", SUITES, "resid_post_16k")
        # Sites of one width share a bank; the heads' outputs are of another.
        fields = {"layers": ALL, "width": 2**14, "sparsity_coefficients": (5e-4,)}
        c.banks = {
            "stream": config.bank_fields(sites=("resid_post", "mlp_out"), **fields),
            "heads": config.bank_fields(sites=("attn_out",), **fields),
        }
        return c
    if suite == "transcoder_16k":
        c = config.gemma_scope("gemma2_2b", SUITES, "resid_post_16k")
        c.banks.main.sites, c.banks.main.target_site = ("mlp_in_gain_free",), "mlp_out"
        return c
    return config.gemma_scope("gemma2_2b", SUITES, suite)
