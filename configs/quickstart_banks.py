"""Many SAEs from one forward pass: the model, text and recipe of `quickstart` with other banks.

    gemma-scope train quickstart_banks:SUITE runs/SUITE

SUITE is one of

  sweep        layer 9, residual stream, 2,048 latents, six λ
  layers       the residual stream of all 18 layers, 1,024 latents
  sites        the residual stream, MLP and attention outputs of all 18 layers, 512 latents
  targets      layer 9, residual stream, 1,024 latents, target L0s of 25, 50 and 100: one bank with the controller and
               one with the quadratic penalty
  transcoders  the MLP of layer 9, 2,048 latents: a transcoder as in Gemma Scope, and one with a skip connection as in
               Gemma Scope 2

Hardware: two CPU cores; 15 to 30 minutes per suite.
Expected: the numbers in results/SUITE.json, which `python -m benchmarks.results SUITE` measures.
"""

import ml_collections

from gemma_scope_jax import config
from gemma_scope_jax.training import config_files

LAYER = 9


def get_config(suite: str = "sweep") -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict(config_files.load("quickstart"))
    recipe = {"bandwidth": 0.04, "initial_threshold": 0.04, "window_updates": 400}
    lambdas = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    targets = {"layers": (LAYER,), "width": 1024, "target_l0s": (25.0, 50.0, 100.0)}
    # With Gemma Scope's own scale, "read", λ would not mean the same as for an autoencoder.
    mlp = {"layers": (LAYER,), "width": 2048, "target_site": "mlp_out", "scale_target_by": "target"}
    everywhere = {"layers": tuple(range(18)), "width": 512, "sparsity_coefficients": (5e-4,)}
    banks = {
        "sweep": {"residual": {"layers": (LAYER,), "width": 2048, "sparsity_coefficients": lambdas}},
        "layers": {"residual": {"layers": tuple(range(18)), "width": 1024, "sparsity_coefficients": (5e-4,)}},
        "sites": {
            "residual_and_mlp": {"sites": ("resid_post", "mlp_out"), **everywhere},
            "attention": {"sites": ("attn_out",), **everywhere},  # Its activations have another width.
        },
        "targets": {
            "controlled": {**targets, "objective": "controlled", "sparsity_coefficients": (5e-4,)},
            "quadratic": {**targets, "objective": "quadratic", "sparsity_coefficients": (1e-3,)},
        },
        "transcoders": {
            "plain": {**mlp, "sites": ("mlp_in_gain_free",), "sparsity_coefficients": (5e-4,)},
            "skip": {**mlp, "sites": ("mlp_in",), "skip": True, "sparsity_coefficients": (5e-4,)},
        },
    }
    if suite not in banks:
        raise ValueError(f"unknown suite {suite!r}; choose one of {', '.join(banks)}")
    if suite == "sites":  # Half the memory that 54 sites would take, and a fifth of the tokens.
        c.train.sequences_per_step, c.train.tokens = 8, 48 * 2048
        c.ring.capacity = 5 * 2048
        c.optimizer.sparsity_warmup_updates = 150  # Of 384.
        c.log.evaluate_every = 0
    c.banks = {name: config.bank_fields(**recipe, **fields) for name, fields in banks[suite].items()}
    return c
