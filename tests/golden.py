"""The setup and results of DeepMind's notebook on JumpReLU SAEs (Rajamanoharan et al., arXiv 2407.14435)."""

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.saes import jumprelu, objectives

BANDWIDTH, SPARSITY_COEFFICIENT = 0.1, 1.2
PENALTY = objectives.linear_penalty(SPARSITY_COEFFICIENT)

# Gradients on the first batch: the stride, and every stride-th value.
GRADIENTS = {
    "b_dec": (7, [-1.7614671, -2.9526186, 0.99276465]),
    "b_enc": (37, [0.29240608, 0.9655949, 0.20811056, 1.051967]),
    "log_threshold": (37, [-0.01634991, -0.00306892, -0.00966095, -0.0034949]),
    "W_dec": (601, [0.02478151, -0.01372844, 0.00353589, 0.10577872]),
    "W_enc": (601, [0.02030803, 0.02437474, -0.01442294, 0.01866631]),
}

# Parameters after three updates at a learning rate of 1e-3: the stride, and every stride-th value. They have an error
# of up to 5e-7 from float32 arithmetic in Adam's bias correction; `three_updates_in_numpy` differs by that amount.
AFTER_THREE_UPDATES = {
    "b_dec": (7, [0.04524906, -0.03720585, -0.03994906]),
    "b_enc": (37, [0.01241532, -0.03432115, -0.03897703, 0.01650386]),
    "log_threshold": (37, [-4.5912695, -6.2672825, -5.0748363, -6.345015]),
    "W_dec": (601, [-0.05179337, -0.08356037, 0.02901143, -0.36985442]),
    "W_enc": (601, [0.04418736, -0.1515689, 0.14993134, -0.12296465]),
}


def setup() -> tuple[jumprelu.Params, np.ndarray]:
    """Initial parameters and three batches of 1,024 activations, in float64."""
    batches = np.random.default_rng(9328302).normal(size=(3, 1024, 16)) / 4
    rng = np.random.default_rng(24396)
    W_dec = rng.uniform(size=(128, 16)) - 0.5
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    W_enc = rng.uniform(size=(16, 128)) - 0.5
    b_enc = (rng.uniform(size=128) - 0.5) * 0.1
    b_dec = (rng.uniform(size=16) - 0.5) * 0.1
    threshold = 0.15 * rng.uniform(size=128) * 0.1
    params = jumprelu.Params(
        *(jnp.asarray(v, jnp.float64) for v in (W_enc, b_enc, np.log(threshold), W_dec, b_dec))
    )
    return params, jnp.asarray(batches, jnp.float64)


def three_updates_in_numpy() -> dict[str, np.ndarray]:
    """The parameters after the same three updates, in float64 and without Adam's first moment, since β₁ = 0."""
    params, batches = setup()
    p = {name: np.array(getattr(params, name)) for name in AFTER_THREE_UPDATES}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    for t, x in enumerate(np.array(batches), 1):
        threshold, n = np.exp(p["log_threshold"]), len(x)
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        f = pre * (pre > threshold)
        g_recon = 2 * (f @ p["W_dec"] + p["b_dec"] - x) / n
        g_f = g_recon @ p["W_dec"].T
        g_pre = g_f * (pre > threshold)
        kernel = np.abs(pre - threshold) < BANDWIDTH / 2
        g_threshold = -(kernel * (threshold * g_f + SPARSITY_COEFFICIENT / n)).sum(0) / BANDWIDTH
        g = {
            "W_enc": (x - p["b_dec"]).T @ g_pre,
            "b_enc": g_pre.sum(0),
            "b_dec": g_recon.sum(0) - p["W_enc"] @ g_pre.sum(0),
            "W_dec": f.T @ g_recon,
            "log_threshold": threshold * g_threshold,
        }
        direction = p["W_dec"] / (np.linalg.norm(p["W_dec"], axis=1, keepdims=True) + 1e-6)
        g["W_dec"] -= (g["W_dec"] * direction).sum(1, keepdims=True) * direction
        for name in p:
            v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
            p[name] -= 1e-3 * g[name] / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
        p["W_dec"] /= np.linalg.norm(p["W_dec"], axis=1, keepdims=True)
    return p
