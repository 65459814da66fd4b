"""Gemma Scope's SAEs on Gemma 2 2B.

    gemma-scope train gemma2_2b:SUITE runs/2b

SUITE is a site and a width. The suites with all 26 layers are resid_post, mlp_out and attn_out, each with 16k and 65k
latents; resid_post_16k is the default. On the residual stream there are also 32k, 131k, 262k and 524k at layer 12,
and 1m at layers 5, 12 and 19. To train on fewer layers, add for example `--banks.main.layers 12`. Two more suites:

  all_16k         residual stream, MLP and attention of all 26 layers in one run: 78 SAEs from one forward pass
  transcoder_16k  transcoders of the MLPs of all 26 layers, as in appendix B

Hardware: one layer of 16k on a v5e-8; all layers of 16k, of one site or of all three, on a v5p-32.
`gemma-scope plan` prints the needs of any suite; results/tpu.json has some of them.
The text is C4, because Google's training text is not public.
Expected at layer 12, residual stream, 16k: L0 from 22 to 445, depending on λ (the range of the SAEs that Google
published).
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
        # The sites of a bank must have the same width, and the heads' outputs have another width.
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
