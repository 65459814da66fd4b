"""The one compiled step, and the state it carries.

Tokens → Gemma up to the deepest site → mask and normalise → ring → K updates of a bank of E SAEs.

Shapes: S sequences, L context length, T = S·L = K·B activations of a step, B batch, R ring groups, E members.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax
from gemma import gm

from gemma_scope_jax import gemma, optim, ring, sae, sharding, weights


@dataclasses.dataclass(frozen=True)
class Member:
    """One SAE of a bank."""

    site: gemma.Site
    sparsity_coefficient: float
    seed: int

    @property
    def name(self) -> str:
        """Differs from every other member's."""
        seed = f"_seed_{self.seed}" if self.seed else ""
        return f"{self.site}_lambda_{self.sparsity_coefficient}{seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the step is compiled for."""

    members: tuple[Member, ...]
    padded_members: int  # The bank's E: members, padded so that the mesh's `data` axis divides it.
    latents: int
    batch: int  # B
    updates_per_step: int  # K
    harvests: int  # Steps that run Gemma; the steps after them drain the ring.
    ring_groups: int
    ring_capacity: int
    bandwidth: float
    initial_threshold: float
    dead_after_updates: int
    optimizer: optim.OptimizerConfig
    precision: str
    seed: int
    masked_prefix: int = 0  # See `gemma.is_kept`.

    @property
    def activations(self) -> int:
        """T, the positions harvested by a step."""
        return self.batch * self.updates_per_step

    @property
    def ring_steps(self) -> int:
        """How many steps' activations the ring holds."""
        return self.ring_capacity // self.activations

    @property
    def total_updates(self) -> int:
        return self.harvests * self.updates_per_step

    @property
    def sites(self) -> tuple[gemma.Site, ...]:
        """The sites read, each once, in the members' order."""
        return tuple(dict.fromkeys(member.site for member in self.members))


@flax.struct.dataclass
class Normalizer:
    """How a site's activations become SAE inputs, (x - mean) / scale, and how much each counts.

    A few tokens of Gemma 3 have a squared norm thousands of times the median: squared errors would be about
    them alone. A token above `max_squared_norm` weighs less, so that none counts for more than one at the limit.
    """

    mean_D: jax.Array  # Subtracted; zeros in Gemma Scope's own recipe.
    scale: jax.Array  # [], the weighted root mean square norm of x - mean: inputs have mean square norm 1.
    max_squared_norm: jax.Array  # [], of x - mean; infinite where every token weighs the same.
    ablation_mean_D: jax.Array  # The mean over all unmasked positions, outliers included, for mean ablation.


@flax.struct.dataclass
class State:
    """All that a run carries from step to step; what a checkpoint holds."""

    step: jax.Array  # [], int32, steps done
    harvests: jax.Array  # [], int32, steps done that ran Gemma
    fills: jax.Array  # [], int32, steps done that only filled the ring
    params: sae.Params  # leading axis E
    opt_state: optax.OptState
    idle_ExM: jax.Array  # int32, updates since a latent last fired
    ring: ring.Ring
    normalizers: Mapping[str, Normalizer]  # by site
    key: jax.Array  # raw key data, uint32

    @property
    def draws(self) -> jax.Array:
        """Steps done that updated the bank: all but those that only filled the ring."""
        return self.step - self.fills


@flax.struct.dataclass
class Batch:
    """Rows of packed tokens and where they came from."""

    tokens_SxL: jax.Array
    row_S: jax.Array
    first_document_S: jax.Array


@flax.struct.dataclass
class Metrics:
    """What a step reports; the averages are over its K updates."""

    trained: jax.Array  # [], bool: whether the bank was updated
    loss_E: jax.Array
    l0_E: jax.Array
    fvu_E: jax.Array
    dead_fraction_E: jax.Array
    learning_rate: jax.Array
    sparsity_warmup: jax.Array
    activations_E: jax.Array  # trained on in this step
    source_Bx3: jax.Array  # row, position and document of the first batch's activations
    weight_B: jax.Array  # of the first batch, first member's site


def init_state(plan: Plan, normalizers: Mapping[str, Normalizer], dtype: jnp.dtype) -> State:
    """The state before the first step. Traceable, so that it can be built directly into its sharding.

    Args:
      plan: what the run trains.
      normalizers: from calibration, by site.
      dtype: Gemma's, in which the ring keeps activations.
    """
    key = jax.random.key(plan.seed)
    widths = {site: n.mean_D.shape[0] for site, n in normalizers.items()}
    d = widths[str(plan.sites[0])]
    seeds_E = jnp.array([m.seed for m in _pad(plan.members, plan.padded_members)])
    params = jax.vmap(
        lambda seed: sae.init(
            jax.random.fold_in(jax.random.fold_in(key, 0), seed), d, plan.latents, plan.initial_threshold
        )
    )(seeds_E)
    optimizer = optim.make_optimizer(plan.optimizer, plan.total_updates)
    return State(
        step=jnp.zeros((), jnp.int32),
        harvests=jnp.zeros((), jnp.int32),
        fills=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        idle_ExM=jnp.zeros((plan.padded_members, plan.latents), jnp.int32),
        ring=ring.init(plan.ring_groups, plan.ring_capacity, widths, dtype),
        normalizers=dict(normalizers),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


def _pad(values: Sequence, size: int) -> list:
    return [*values, *[values[-1]] * (size - len(values))]


def outlier_weight(squared_norm: jax.Array, max_squared_norm: jax.Array) -> jax.Array:
    """The weight of tokens by the squared norm of x - mean: 1 up to the limit, then in inverse proportion."""
    return jnp.minimum(1, max_squared_norm / jnp.maximum(squared_norm, jnp.finfo(squared_norm.dtype).tiny))


def calibrate(x_NxD: jax.Array, weight_N: jax.Array, center: bool, outlier_medians: float) -> Normalizer:
    """A site's normaliser from a sample of its activations.

    Args:
      x_NxD: activations.
      weight_N: 0 where masked.
      center: subtract the mean, outliers weighed less; Gemma Scope does not.
      outlier_medians: the largest centred squared norm of full weight, in medians; 0 for no limit.
    """
    x_NxD = x_NxD.astype(jnp.float32)

    def mean(values: jax.Array, weight_N: jax.Array) -> jax.Array:
        # At full precision: a matmul of float32 is rounded to bfloat16 on TPU.
        return jnp.matmul(weight_N, values, precision=jax.lax.Precision.HIGHEST) / weight_N.sum()

    ablation_mean_D = mean(x_NxD, weight_N)
    squared_N = jnp.square(x_NxD - center * ablation_mean_D[None]).sum(1)
    median = jnp.nanmedian(jnp.where(weight_N > 0, squared_N, jnp.nan))
    limit = outlier_medians * median if outlier_medians else jnp.asarray(jnp.inf)
    weight_N = weight_N * outlier_weight(squared_N, limit)
    mean_D = center * mean(x_NxD, weight_N)
    return Normalizer(
        mean_D=mean_D,
        scale=jnp.sqrt(mean(jnp.square(x_NxD - mean_D[None]).sum(1), weight_N)),
        max_squared_norm=limit,
        ablation_mean_D=ablation_mean_D,
    )


def gather_gemma(mesh: jax.sharding.Mesh, params: weights.Params) -> weights.Params:
    """Gemma's blocks whole on each chip, gathered when their turn comes if they were split.

    Said here, or the compiler may split a block's matrices and send activations about instead. The embedding
    stays as it is: looking up a part of each vector costs less than gathering 256,000 of them.
    """
    whole = sharding.constrain(mesh, params, sharding.REPLICATED)
    return {**whole, "embedder": params["embedder"]}


def harvest(
    model: gm.nn.Transformer,
    params: weights.Params,
    batch: Batch,
    normalizers: Mapping[str, Normalizer],
    sites: Sequence[gemma.Site],
    groups: int,
    dtype: jnp.dtype,
    masked_prefix: int = 0,
) -> ring.Slots:
    """Runs Gemma to the deepest site: normalised activations of every position, as the ring takes them."""
    tokens_SxL = batch.tokens_SxL
    values = gemma.read_sites(model, params, tokens_SxL, sites)
    is_kept_T = gemma.is_kept(tokens_SxL, masked_prefix).reshape(-1)
    acts, weight = {}, {}
    for site in sites:
        normalizer = normalizers[str(site)]
        x_TxD = values[site].reshape(is_kept_T.size, -1).astype(jnp.float32) - normalizer.mean_D[None]
        weight_T = outlier_weight(jnp.square(x_TxD).sum(1), normalizer.max_squared_norm)
        acts[str(site)] = (x_TxD / normalizer.scale).astype(dtype)
        weight[str(site)] = is_kept_T * weight_T

    length = tokens_SxL.shape[1]
    segment_SxL = jnp.maximum(jnp.cumsum(tokens_SxL == gemma.BOS, axis=1) - 1, 0)
    source_SxLx3 = jnp.stack(
        [
            jnp.broadcast_to(batch.row_S[:, None], tokens_SxL.shape),
            jnp.broadcast_to(jnp.arange(length)[None], tokens_SxL.shape),
            batch.first_document_S[:, None] + segment_SxL,
        ],
        axis=-1,
    )
    new = ring.Slots(acts=acts, weight=weight, source=source_SxLx3.reshape(-1, 3))
    return jax.tree.map(lambda value: ring.group_rows(value, groups), new)


def update_bank(
    plan: Plan,
    mesh: jax.sharding.Mesh,
    carry: tuple[sae.Params, optax.OptState, jax.Array],
    batch: ring.Slots,
    sparsity_warmup: jax.Array,
) -> tuple[tuple[sae.Params, optax.OptState, jax.Array], sae.BatchSums]:
    """One update of every member on its own site's rows of one batch."""
    params, opt_state, idle_ExM = carry
    members = _pad(plan.members, plan.padded_members)
    sites = [str(member.site) for member in members]
    # A padding member's rows all have weight 0: it stays as it began.
    is_real_E = jnp.arange(plan.padded_members) < len(plan.members)
    x_ExBxD = jnp.stack([batch.acts[site] for site in sites]).astype(jnp.float32)
    weight_ExB = jnp.stack([batch.weight[site] for site in sites]) * is_real_E[:, None]
    # Said here, or the compiler gathers the same activations for each use. In two stages, so that a chip is
    # sent its own members' activations and no others: an all-to-all over `data`, an all-gather over `latent`.
    for spec in (sharding.MEMBERS_SPLIT, sharding.MEMBERS):
        x_ExBxD, weight_ExB = sharding.constrain(mesh, (x_ExBxD, weight_ExB), spec)
    coefficient_E = jnp.array([member.sparsity_coefficient for member in members]) * sparsity_warmup

    gradient, sums = jax.vmap(
        lambda *args: sae.loss_gradient(*args, plan.bandwidth, jax.lax.Precision(plan.precision))
    )(params, x_ExBxD, weight_ExB, coefficient_E)
    optimizer = optim.make_optimizer(plan.optimizer, plan.total_updates)
    params, opt_state = optim.apply_gradient(optimizer, gradient, opt_state, params)
    idle_ExM = jnp.where(sums.fired_M, 0, idle_ExM + 1)
    return (params, opt_state, idle_ExM), sums


def train(
    plan: Plan, mesh: jax.sharding.Mesh, state: State, batches: ring.Slots
) -> tuple[tuple, sae.BatchSums]:
    """K updates, one after the other; the sums of each batch are returned stacked on axis K."""
    warmup = optim.sparsity_warmup(plan.optimizer)
    first_update = state.draws * plan.updates_per_step

    def body(carry: tuple, xs: tuple) -> tuple:
        k, batch = xs
        carry, sums = update_bank(plan, mesh, carry, batch, warmup(first_update + k))
        # Which latents fired is folded into `idle` and too large to stack.
        return carry, sums.replace(fired_M=None)

    carry = (state.params, state.opt_state, state.idle_ExM)
    return jax.lax.scan(body, carry, (jnp.arange(plan.updates_per_step), batches))


def make_step(
    plan: Plan, mesh: jax.sharding.Mesh, model: gm.nn.Transformer, dtype: jnp.dtype
) -> Callable[..., tuple[State, Metrics]]:
    """The step as a function (state, batch, gemma_params) → (state, metrics), to be jitted with state donated."""
    k, groups = plan.updates_per_step, plan.ring_groups

    def step(state: State, batch: Batch, gemma_params: weights.Params) -> tuple[State, Metrics]:
        draining = state.harvests >= plan.harvests
        occupancy = state.harvests - state.draws
        drawing = draining | (occupancy == plan.ring_steps)

        with jax.named_scope("ring_draw"):
            key = jax.random.wrap_key_data(state.key)
            index_RxT = ring.choose_slots(
                state.ring, key, plan.activations // groups, state.step, occupancy, draining
            )
            drawn = ring.gather(state.ring.slots, index_RxT)

        def run_gemma() -> ring.Slots:
            with jax.named_scope("gemma"):
                whole = gather_gemma(mesh, gemma_params)
                return harvest(
                    model, whole, batch, state.normalizers, plan.sites, groups, dtype, plan.masked_prefix
                )

        new = jax.lax.cond(draining, lambda: jax.tree.map(jnp.zeros_like, drawn), run_gemma)
        with jax.named_scope("ring_write"):
            slots = ring.scatter(state.ring.slots, index_RxT, new)

        batches = jax.tree.map(lambda value: ring.deal(value, k), drawn)

        def run_bank() -> tuple:
            with jax.named_scope("bank"):
                return train(plan, mesh, state, batches)

        def skip_bank() -> tuple:
            sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run_bank)[1])
            return (state.params, state.opt_state, state.idle_ExM), sums

        (params, opt_state, idle_ExM), sums = jax.lax.cond(drawing, run_bank, skip_bank)

        harvests = state.harvests + ~draining
        fills = state.fills + ~drawing
        is_full = harvests - (state.step + 1 - fills) == plan.ring_steps
        new_state = state.replace(
            step=state.step + 1,
            harvests=harvests,
            fills=fills,
            params=params,
            opt_state=opt_state,
            idle_ExM=idle_ExM,
            ring=ring.Ring(slots, jnp.where(is_full, harvests, state.ring.last_full)),
        )
        return new_state, _metrics(plan, state, new_state, batches, sums, drawing)

    return step


def _metrics(
    plan: Plan, old: State, new: State, batches: ring.Slots, sums: sae.BatchSums, trained: jax.Array
) -> Metrics:
    """Averages over a step's updates. FVU is against the step's own mean."""
    last_update = old.draws * plan.updates_per_step + plan.updates_per_step - 1
    warmup_K = jax.vmap(optim.sparsity_warmup(plan.optimizer))(
        last_update - jnp.arange(plan.updates_per_step)[::-1]
    )
    members = _pad(plan.members, plan.padded_members)
    coefficient_KxE = warmup_K[:, None] * jnp.array([m.sparsity_coefficient for m in members])[None]
    weight_E = sums.weight.sum(0)
    penalty_E = (coefficient_KxE * sums.l0).sum(0)
    variance_E = sums.x_squared.sum(0) - jnp.square(sums.x_D.sum(0)).sum(-1) / weight_E
    sites = [str(member.site) for member in plan.members]
    real = slice(len(plan.members))
    return Metrics(
        trained=trained,
        loss_E=((sums.squared_error.sum(0) + penalty_E) / weight_E)[real],
        l0_E=(sums.l0.sum(0) / weight_E)[real],
        fvu_E=(sums.squared_error.sum(0) / variance_E)[real],
        dead_fraction_E=(new.idle_ExM >= plan.dead_after_updates).mean(1)[real],
        learning_rate=optim.learning_rate(plan.optimizer, plan.total_updates)(last_update) * trained,
        sparsity_warmup=jnp.asarray(warmup_K[-1]),
        activations_E=jnp.stack([(batches.weight[site] > 0).sum() for site in sites]) * trained,
        source_Bx3=batches.source[0],
        weight_B=batches.weight[sites[0]][0],
    )
