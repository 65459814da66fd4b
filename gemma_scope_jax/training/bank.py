"""A bank: SAEs or transcoders that share one shape and are trained together, on any layers and sites.

Shapes: E members, B batch, D width of the input site, O width of the target site, M latents.
"""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma_scope_jax import config
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import ranges, sharding
from gemma_scope_jax.saes import jumprelu, naming, objectives, products
from gemma_scope_jax.training import optimizer as optimizer_lib
from gemma_scope_jax.training import shardings, shuffle_buffer
from gemma_scope_jax.training.normalizer import Normalizer

COEFFICIENT_REACH = 1000  # The largest factor by which an objective can move λ from its configured value.


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static settings for which a bank's update is compiled; see `config.BankConfig`."""

    name: str
    members: tuple[naming.Member, ...]
    padded_members: int  # E: the number of members, rounded up to a multiple of the mesh's `data` axis.
    scale_target_by: str
    bandwidth: float
    initial_threshold: float
    window_updates: int
    precision: products.Precision

    @property
    def width(self) -> int:
        """M, the number of latents of each member."""
        return self.members[0].width

    @property
    def objective(self) -> objectives.Objective:
        """The bank's objective.

        Raises:
          ValueError: if no objective has the configured name.
        """
        return objectives.objective_of(self.members[0].objective)

    @property
    def padded(self) -> list[naming.Member]:
        """The members, with the last member repeated as padding."""
        return [*self.members, *[self.members[-1]] * (self.padded_members - len(self.members))]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The input and target sites, each once, in the members' order."""
        return tuple(dict.fromkeys(site for m in self.members for site in (m.site, m.target_site)))


@flax.struct.dataclass
class Firing:
    """How often each latent fires: counts in the current window, frequencies in the last complete window."""

    count_ExM: jax.Array  # int32
    rows_E: jax.Array  # int32, activations counted so far in the current window
    frequency_ExM: jax.Array  # in the last complete window; zeros before the first window ends
    windows_E: jax.Array  # int32, complete windows so far


@flax.struct.dataclass
class State:
    """A bank's training state, carried from update to update. Every array has a leading axis E."""

    params: jumprelu.Params
    opt_state: optax.OptState
    updates_E: jax.Array  # int32, updates of each member so far
    coefficient_E: jax.Array  # λ, constant unless the objective changes it, as `controlled` does
    firing: Firing


@flax.struct.dataclass
class Metrics:
    """Metrics of a bank's members in one step. Averages are over the step's updates."""

    loss_E: jax.Array
    l0_E: jax.Array
    fvu_E: jax.Array  # relative to the mean of the step's own activations
    activations_E: jax.Array  # number of activations trained on in this step
    dead_E: jax.Array  # latents that did not fire in the last complete window; -1 before the first ends
    dense_E: jax.Array  # latents that fired on more than `jumprelu.DENSE` of that window
    learning_rate_E: jax.Array
    sparsity_coefficient_E: jax.Array  # λ at the step's last update, with its warm-up
    threshold_E: jax.Array  # geometric mean over latents, in units of normalised activations
    theta_from_error_E: jax.Array  # see `objectives.BatchSums`
    theta_from_sparsity_E: jax.Array
    theta_reached_E: jax.Array


def init(plan: Plan, key: jax.Array, normalizers: Mapping[str, Normalizer]) -> State:
    """The state before the first update. It is traceable, so that `jit` can create it in its sharding."""
    first = plan.members[0]
    d, o = (normalizers[str(site)].mean_D.shape[0] for site in (first.site, first.target_site))

    def init_one(seed: jax.Array) -> jumprelu.Params:
        return jumprelu.init(
            jax.random.fold_in(key, seed),
            d,
            plan.width,
            plan.initial_threshold,
            o if first.is_transcoder else None,
            first.skip,
        )

    params = jax.vmap(init_one)(jnp.array([member.seed for member in plan.padded]))
    e, m = plan.padded_members, plan.width
    return State(
        params=params,
        # With vmap, each member counts its own updates.
        opt_state=jax.vmap(optimizer_lib.make_optimizer(config.OptimizerConfig()).init)(params),
        updates_E=jnp.zeros(e, jnp.int32),
        coefficient_E=jnp.array([member.sparsity_coefficient for member in plan.padded]),
        firing=Firing(
            count_ExM=jnp.zeros((e, m), jnp.int32),
            rows_E=jnp.zeros(e, jnp.int32),
            frequency_ExM=jnp.zeros((e, m)),
            windows_E=jnp.zeros(e, jnp.int32),
        ),
    )


def target_scales(plan: Plan, normalizers: Mapping[str, Normalizer]) -> jax.Array:
    """The scale [E] that divides each member's raw target; see `config.BankConfig.scale_target_by`."""
    by_target = plan.scale_target_by == "target"
    return jnp.stack([normalizers[str(m.target_site if by_target else m.site)].scale for m in plan.padded])


def _member_batches(
    plan: Plan, mesh: jax.sharding.Mesh, normalizers: Mapping[str, Normalizer], batch: shuffle_buffer.Slots
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Each member's inputs, row weights and transcoder targets (otherwise None), on the member's chips."""
    members = plan.padded
    sites = [str(member.site) for member in members]
    targets = [str(member.target_site) for member in members]
    # All rows of a padding member have weight 0, so it never changes.
    is_real_E = jnp.arange(plan.padded_members) < len(plan.members)
    x_ExBxD = jnp.stack([batch.acts[site] for site in sites])
    # A row counts as an outlier if it is one at either site.
    weight_ExB = jnp.stack(
        [jnp.minimum(batch.weight[s], batch.weight[t]) for s, t in zip(sites, targets, strict=True)]
    )
    weight_ExB = weight_ExB * is_real_E[:, None]
    is_transcoder = plan.members[0].is_transcoder
    y_ExBxO = jnp.stack([batch.acts[target] for target in targets]) if is_transcoder else None
    # Without these constraints the compiler gathers the same activations once for each use. Two stages, an
    # all-to-all over `data` and an all-gather over `latent`, send a chip only its own members' activations.
    for spec in (shardings.MEMBERS_SPLIT, shardings.MEMBERS):
        x_ExBxD, weight_ExB, y_ExBxO = sharding.constrain(mesh, (x_ExBxD, weight_ExB, y_ExBxO), spec)
    # Cast after the transfer, so that the transfer uses the ring's dtype.
    x_ExBxD = x_ExBxD.astype(jnp.float32)
    if is_transcoder:
        # In the ring, each site is divided by its own scale.
        own_E = jnp.stack([normalizers[target].scale for target in targets])
        y_ExBxO = y_ExBxO.astype(jnp.float32) * (own_E / target_scales(plan, normalizers))[:, None, None]
    return x_ExBxD, weight_ExB, y_ExBxO


def _next_coefficient(
    plan: Plan,
    optimizer_config: config.OptimizerConfig,
    state: State,
    sums: objectives.BatchSums,
    rate_E: jax.Array,
) -> jax.Array:
    """λ after an update: unchanged, unless the objective moves it."""
    if plan.objective.next_coefficient is None:
        return state.coefficient_E
    # λ does not move during its warm-up, nor after a batch in which no activation counts.
    moves_E = (state.updates_E >= optimizer_config.sparsity_warmup_updates) & (sums.weight > 0)
    target_l0_E = jnp.array([member.target_l0 for member in plan.padded])
    l0_E = sums.l0 / jnp.where(sums.weight > 0, sums.weight, 1)
    moved_E = plan.objective.next_coefficient(state.coefficient_E, l0_E, target_l0_E, rate_E)
    moved_E = jnp.where(moves_E, moved_E, state.coefficient_E)
    # A target L0 that cannot be reached must not move λ out of float32's range.
    given_E = jnp.array([member.sparsity_coefficient for member in plan.padded])
    return jnp.clip(moved_E, given_E / COEFFICIENT_REACH, given_E * COEFFICIENT_REACH)


def update(
    plan: Plan,
    optimizer_config: config.OptimizerConfig,
    mesh: jax.sharding.Mesh,
    normalizers: Mapping[str, Normalizer],
    state: State,
    batch: shuffle_buffer.Slots,
    number: jax.Array,
    total_updates: int,
) -> tuple[State, objectives.BatchSums]:
    """One update of every member on its own site's rows of one batch, after `number` updates of the run."""
    optimizer = optimizer_lib.make_optimizer(optimizer_config)
    options = {**plan.objective.options, **dict(plan.members[0].options)}
    x_ExBxD, weight_ExB, y_ExBxO = _member_batches(plan, mesh, normalizers, batch)

    def update_one(
        params: jumprelu.Params,
        opt_state: optax.OptState,
        x_BxD: jax.Array,
        weight_B: jax.Array,
        y_BxO: jax.Array | None,
        coefficient: jax.Array,
        target_l0: jax.Array,
        rate: jax.Array,
    ) -> tuple[jumprelu.Params, optax.OptState, objectives.BatchSums]:
        gradient, sums = objectives.gradient_of(
            plan.objective,
            params,
            objectives.Examples(x_BxD, weight_B, y_BxO),
            plan.objective.penalty(coefficient, target_l0, options),
            plan.bandwidth,
            plan.precision,
        )
        return *optimizer_lib.apply_gradient(optimizer, gradient, opt_state, params, rate), sums

    rate_E = optimizer_lib.learning_rate(optimizer_config, total_updates, number, state.updates_E)
    target_l0_E = jnp.array([member.target_l0 for member in plan.padded])
    params, opt_state, sums = jax.vmap(update_one)(
        state.params,
        state.opt_state,
        x_ExBxD,
        weight_ExB,
        y_ExBxO,
        state.coefficient_E * optimizer_lib.sparsity_warmup(optimizer_config)(state.updates_E),
        target_l0_E,
        rate_E,
    )
    new = State(
        params=params,
        opt_state=opt_state,
        updates_E=state.updates_E + 1,
        coefficient_E=_next_coefficient(plan, optimizer_config, state, sums, rate_E),
        firing=_count(plan, state, sums),
    )
    return new, sums


def _count(plan: Plan, state: State, sums: objectives.BatchSums) -> Firing:
    """Adds one batch to the counts. A window that ends with this batch becomes the last complete window."""
    count_ExM = state.firing.count_ExM + sums.fired_M
    rows_E = state.firing.rows_E + sums.rows
    ends_E = (state.updates_E + 1) % plan.window_updates == 0
    frequency_ExM = count_ExM / jnp.maximum(rows_E, 1)[:, None]
    return Firing(
        count_ExM=jnp.where(ends_E[:, None], 0, count_ExM),
        rows_E=jnp.where(ends_E, 0, rows_E),
        frequency_ExM=jnp.where(ends_E[:, None], frequency_ExM, state.firing.frequency_ExM),
        windows_E=state.firing.windows_E + ends_E,
    )


def metrics(
    plan: Plan,
    optimizer_config: config.OptimizerConfig,
    state: State,
    sums: objectives.BatchSums,
    number: jax.Array,
    total_updates: int,
) -> Metrics:
    """The metrics of the members, without padding.

    Args:
      plan: the bank's plan.
      optimizer_config: the run's optimizer settings.
      state: the bank's state after the step.
      sums: the sums [K, E] of the step's updates.
      number: the index of the step's last update in the run.
      total_updates: the number of updates in the run.
    """
    weight_E = sums.weight.sum(0)
    l0_E, fvu_E = l0_and_fvu(sums)
    own_E = state.updates_E - 1
    has_window_E = state.firing.windows_E > 0
    of_all = Metrics(
        loss_E=sums.squared_error.sum(0) / weight_E + sums.penalty.mean(0),
        l0_E=l0_E,
        fvu_E=fvu_E,
        activations_E=sums.rows.sum(0),
        dead_E=jnp.where(has_window_E, (state.firing.frequency_ExM == 0).sum(1), -1),
        dense_E=jnp.where(has_window_E, (state.firing.frequency_ExM > jumprelu.DENSE).sum(1), -1),
        learning_rate_E=optimizer_lib.learning_rate(optimizer_config, total_updates, number, own_E),
        sparsity_coefficient_E=state.coefficient_E * optimizer_lib.sparsity_warmup(optimizer_config)(own_E),
        threshold_E=jnp.exp(state.params.log_threshold.mean(1)),
        theta_from_error_E=sums.theta_from_error.mean(0),
        theta_from_sparsity_E=sums.theta_from_sparsity.mean(0),
        theta_reached_E=sums.theta_reached.mean(0),
    )
    return jax.tree.map(lambda value: value[: len(plan.members)], of_all)


def l0_and_fvu(sums: objectives.BatchSums) -> tuple[jax.Array, jax.Array]:
    """L0 and FVU, each [E], from the sums [K, E] of K batches.

    Both are NaN if no activation counts. FVU is also NaN if all activations are the same.
    """
    weight_E = sums.weight.sum(0)
    mean_ExO = sums.target_O.sum(0) / weight_E[:, None]
    # The variance within the batches, plus the variance of the batch means around the overall mean.
    batch_mean_KxExO = sums.target_O / jnp.where(sums.weight > 0, sums.weight, 1)[..., None]
    apart_KxE = jnp.square(batch_mean_KxExO - mean_ExO[None]).sum(-1)
    variance_E = (sums.target_variance + sums.weight * apart_KxE).sum(0)
    varies_E = variance_E > ranges.CONSTANT * weight_E * jnp.square(mean_ExO).sum(-1)
    fvu_E = jnp.where(varies_E, sums.squared_error.sum(0) / variance_E, jnp.nan)
    return sums.l0.sum(0) / weight_E, fvu_E


def measure(
    plan: Plan,
    mesh: jax.sharding.Mesh,
    normalizers: Mapping[str, Normalizer],
    params: jumprelu.Params,
    batch: shuffle_buffer.Slots,
) -> objectives.BatchSums:
    """The sums that an update on a batch would return, without the update."""
    x_ExBxD, weight_ExB, y_ExBxO = _member_batches(plan, mesh, normalizers, batch)

    def of_one(
        params: jumprelu.Params, x_BxD: jax.Array, weight_B: jax.Array, y_BxO: jax.Array | None
    ) -> objectives.BatchSums:
        # The gradient is not used, so the compiler removes it.
        penalty = objectives.linear_penalty(jnp.zeros(()))
        return objectives.loss_gradient(
            params, x_BxD, weight_B, penalty, plan.bandwidth, y_BxO, plan.precision
        )[1]

    return jax.vmap(of_one)(params, x_ExBxD, weight_ExB, y_ExBxO).replace(fired_M=None)


def fold(
    plan: Plan, params: jumprelu.Params, normalizers: Mapping[str, Normalizer], place: int
) -> jumprelu.SAE:
    """The SAE of member `place`, with the normalisation folded in; `params` are those of the whole bank."""
    member = plan.members[place]
    own = jax.tree.map(lambda leaf: leaf[place], params)
    read, target = normalizers[str(member.site)], normalizers[str(member.target_site)]
    with jax.default_matmul_precision("highest"):
        if member.is_transcoder:
            scale = target_scales(plan, normalizers)[place]
            return jumprelu.fold_transcoder(own, read.mean_D, read.scale, target.mean_D, scale)
        return jumprelu.fold(own, read.mean_D, read.scale)
