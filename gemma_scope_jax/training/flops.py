"""Formulas for the FLOPs of a step."""

from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.sites import blocks_needed, site_width
from gemma_scope_jax.training import bank, step


def update_flops(plan: bank.Plan, model: gm.nn.Transformer, batch: int) -> int:
    """FLOPs of one update of a bank, padding included: five matrix products, or seven with a skip connection."""
    d, o = (site_width(model, site) for site in (plan.members[0].site, plan.members[0].target_site))
    # The encoder and its gradient; the decoder, its gradient and the gradient of the latents.
    products = plan.width * (2 * d + 3 * o) + (2 * d * o if plan.members[0].skip else 0)
    return 2 * plan.padded_members * batch * products


def step_flops(plan: step.Plan, model: gm.nn.Transformer, length: int) -> tuple[int, list[int]]:
    """FLOPs of a steady step, summed over devices: Gemma's on rows of `length` tokens, and each bank's updates."""
    depth = blocks_needed(plan.sites)
    banks = [update_flops(b, model, plan.batch) * plan.updates_per_step for b in plan.banks]
    return harvest_flops(model, plan.activations // length, length, depth), banks


def harvest_flops(model: gm.nn.Transformer, sequences: int, length: int, num_layers: int) -> int:
    """FLOPs of the forward pass through `num_layers` blocks.

    Counts two FLOPs for each token and weight of the blocks' matrices, and the two matrix products of attention.
    The embedding lookup takes none. Norms, soft-caps and softmax are not counted.
    """
    config = model.config
    d, heads, h = config.embed_dim, config.num_heads, config.head_dim
    matrices = d * h * (2 * heads + 2 * config.num_kv_heads) + 3 * d * config.hidden_dim
    attention = 2 * heads * h * length
    return 2 * sequences * length * num_layers * (matrices + attention)
