"""Gemma Scope 2's layers and widths on Gemma 3.

    gemma-scope train gemma3:MODEL/SUITE runs/gemma3

MODEL is 270m (the default), 1b, 4b, 12b or 27b, each also with -it.

SUITE is a site and a width. The suites with all layers are resid_post, mlp_out and attn_out, each with 16k and 262k
latents; resid_post_16k is the default. The suites resid_post_65k, mlp_out_65k, attn_out_65k and resid_post_1m have
the four layers that Google studied most. Sparsity warms up over 50,000 updates, as in Gemma Scope 2.

Gemma Scope 2 does not report its number of training tokens, so this config uses Gemma Scope's. It does not use Gemma
Scope 2's quadratic penalty and Matryoshka loss.

Hardware: one layer of 270m at 16k on a v5e-8; results/tpu.json has the memory that it needs on each chip.
Expected: the SAEs that Google published have an L0 of 10 to 20 (small), 30 to 60 (medium) or 60 to 150 (big),
depending on λ.
"""

import ml_collections

from gemma_scope_jax import config

LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}
SITES = ("resid_post", "mlp_out", "attn_out")
STUDIED = {
    "270m": (5, 9, 12, 15),
    "1b": (7, 13, 17, 22),
    "4b": (9, 17, 22, 29),
    "12b": (12, 24, 31, 41),
    "27b": (16, 31, 40, 53),
}


def get_config(model_and_suite: str = "270m/resid_post_16k") -> ml_collections.ConfigDict:
    size, _, suite = model_and_suite.partition("/")
    base = size.removesuffix("-it")
    if base not in STUDIED:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(STUDIED)}, each also with -it")
    layers = tuple(range(LAYERS[base]))
    suites = {
        **{f"{site}_{width}": layers for site in SITES for width in ("16k", "262k")},
        **{f"{site}_65k": STUDIED[base] for site in SITES},
        "resid_post_1m": STUDIED[base],
    }
    c = config.gemma_scope(f"gemma3_{size}", suites, suite or "resid_post_16k")
    c.optimizer.sparsity_warmup_updates = 50_000
    c.data.chat_template = size.endswith("-it")
    return c
