"""FLOPs of a step, by formulas."""

from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.sites import blocks_needed, site_width
from gemma_scope_jax.training import bank, step


def update_flops(plan: bank.Plan, model: gm.nn.Transformer, batch: int) -> int:
    """FLOPs of one update of a bank, padding included: five matrix products, seven with a skip connection."""
    d, o = (site_width(model, site) for site in (plan.members[0].site, plan.members[0].target_site))
    # Encoder and its gradient; decoder, its gradient, and what the latents receive.
    products = plan.width * (2 * d + 3 * o) + (2 * d * o if plan.members[0].skip else 0)
    return 2 * plan.padded_members * batch * products


def step_flops(plan: step.Plan, model: gm.nn.Transformer, length: int) -> tuple[int, list[int]]:
    """FLOPs of a steady step on all devices: of Gemma on rows of `length` tokens, and of each bank's updates."""
    depth = blocks_needed(plan.sites)
    banks = [update_flops(b, model, plan.batch) * plan.updates_per_step for b in plan.banks]
    return harvest_flops(model, plan.activations // length, length, depth), banks


def harvest_flops(model: gm.nn.Transformer, sequences: int, length: int, num_layers: int) -> int:
    """FLOPs of the forward pass through `num_layers` blocks.

    Two for each token and weight of the blocks' matrices, and for attention's two products; the lookup of
    embeddings takes none, and norms, soft-caps and softmax are left out.
    """
    config = model.config
    d, heads, h = config.embed_dim, config.num_heads, config.head_dim
    matrices = d * h * (2 * heads + 2 * config.num_kv_heads) + 3 * d * config.hidden_dim
    attention = 2 * heads * h * length
    return 2 * sequences * length * num_layers * (matrices + attention)
