"""The one compiled step, and the state it carries.

Tokens → Gemma up to the deepest site → mask and normalise → ring → K updates of each bank of SAEs.

Shapes: S sequences, L context length, T = S·L = K·B activations of a step, B batch, R ring groups, E members.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax import config
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site, blocks_needed
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import naming, objectives
from gemma_scope_jax.training import bank, shuffle_buffer
from gemma_scope_jax.training.normalizer import Normalizer, outlier_weight


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the step is compiled for."""

    banks: tuple[bank.Plan, ...]
    batch: int  # B
    updates_per_step: int  # K
    harvests: int  # Steps that run Gemma; the steps after them drain the ring.
    ring_groups: int
    ring_capacity: int
    optimizer: config.OptimizerConfig
    seed: int
    masked_prefix: int = 0  # See `masking.is_kept`.

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
    def members(self) -> tuple[naming.Member, ...]:
        """Those of all banks."""
        return tuple(member for bank_plan in self.banks for member in bank_plan.members)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites harvested, each once however many SAEs read it."""
        return tuple(dict.fromkeys(site for bank_plan in self.banks for site in bank_plan.sites))


@flax.struct.dataclass
class State:
    """All that a run carries from step to step; what a checkpoint holds."""

    step: jax.Array  # [], int32, steps done
    harvests: jax.Array  # [], int32, steps done that ran Gemma
    fills: jax.Array  # [], int32, steps done that only filled the ring
    banks: Mapping[str, bank.State]  # by name
    ring: shuffle_buffer.Ring
    normalizers: Mapping[str, Normalizer]  # by site
    key: jax.Array  # raw key data, uint32

    @property
    def draws(self) -> jax.Array:
        """Steps done that updated the banks: all but those that only filled the ring."""
        return self.step - self.fills


@flax.struct.dataclass
class Batch:
    """Rows of packed tokens and where they came from."""

    tokens_SxL: jax.Array
    row_S: jax.Array
    first_document_S: jax.Array


@flax.struct.dataclass
class Nonfinite:
    """Positions of a harvest that would count if a site's activations were finite."""

    count: jax.Array  # [], int32
    first: jax.Array  # [], int32, the place of the first of them in the harvest, of T


@flax.struct.dataclass
class Metrics:
    """What a step reports."""

    trained: jax.Array  # [], bool: whether the banks were updated
    nonfinite: Mapping[str, Nonfinite]  # of what was harvested, by site
    banks: Mapping[str, bank.Metrics]
    source_Bx3: jax.Array  # row, position and document of the first batch's activations
    weight_B: jax.Array  # of the first batch, at the first site


def init_state(plan: Plan, normalizers: Mapping[str, Normalizer], dtype: jnp.dtype) -> State:
    """The state before the first step. Traceable, so that it can be built directly into its sharding.

    Args:
      plan: what the run trains.
      normalizers: from calibration, by site.
      dtype: Gemma's, in which the ring keeps activations.
    """
    key = jax.random.key(plan.seed)
    widths = {site: n.mean_D.shape[0] for site, n in normalizers.items()}
    return State(
        step=jnp.zeros((), jnp.int32),
        harvests=jnp.zeros((), jnp.int32),
        fills=jnp.zeros((), jnp.int32),
        banks={b.name: bank.init(b, jax.random.fold_in(key, 0), normalizers) for b in plan.banks},
        ring=shuffle_buffer.init(plan.ring_groups, plan.ring_capacity, widths, dtype),
        normalizers=dict(normalizers),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


def harvest(
    gemma: Gemma,
    batch: Batch,
    normalizers: Mapping[str, Normalizer],
    sites: Sequence[Site],
    groups: int,
    masked_prefix: int = 0,
) -> shuffle_buffer.Slots:
    """Runs Gemma to the deepest site: normalised activations of every position, as the ring takes them.

    Its weights may be split over the mesh. Activations that are not finite come as zeros, and the weight of those
    that would count is NaN; see `leave_out`.
    """
    tokens_SxL = batch.tokens_SxL
    gemma = gemma.gathered()
    # Each chip keeps its rows. Where the embedding is split the compiler may else leave the stream split by width,
    # and gather all rows' activations in every block.
    x_SxLxD = sharding.constrain(gemma.mesh, forward.embed(gemma, tokens_SxL), sharding.TOKENS)
    layers = range(blocks_needed(sites))
    _, values = forward.run_blocks(gemma, x_SxLxD, tokens_SxL, layers, read=sites)
    is_kept_T = masking.is_kept(tokens_SxL, masked_prefix).reshape(-1)
    acts, weight = {}, {}
    for site in sites:
        normalizer = normalizers[str(site)]
        x_TxD = values[site].reshape(is_kept_T.size, -1).astype(jnp.float32) - normalizer.mean_D[None]
        squared_T = jnp.square(x_TxD).sum(1)
        is_finite_T = jnp.isfinite(squared_T)
        weight_T = outlier_weight(squared_T, normalizer.max_squared_norm)
        acts[str(site)] = jnp.where(is_finite_T[:, None], x_TxD / normalizer.scale, 0).astype(gemma.dtype)
        weight[str(site)] = jnp.where(is_kept_T, jnp.where(is_finite_T, weight_T, jnp.nan), 0)

    length = tokens_SxL.shape[1]
    segment_SxL = jnp.maximum(jnp.cumsum(tokens_SxL == masking.BOS, axis=1) - 1, 0)
    source_SxLx3 = jnp.stack(
        [
            jnp.broadcast_to(batch.row_S[:, None], tokens_SxL.shape),
            jnp.broadcast_to(jnp.arange(length)[None], tokens_SxL.shape),
            batch.first_document_S[:, None] + segment_SxL,
        ],
        axis=-1,
    )
    new = shuffle_buffer.Slots(acts=acts, weight=weight, source=source_SxLx3.reshape(-1, 3))
    return jax.tree.map(lambda value: shuffle_buffer.group_rows(value, groups), new)


def leave_out(slots: shuffle_buffer.Slots) -> tuple[shuffle_buffer.Slots, dict[str, Nonfinite]]:
    """What `harvest` gave with a weight of 0 where an activation is not finite, and where that is, by site."""
    weights, nonfinite = {}, {}
    for site, weight_RxT in slots.weight.items():
        is_bad_RxT = jnp.isnan(weight_RxT)
        place_RxT = jnp.arange(weight_RxT.size, dtype=jnp.int32).reshape(weight_RxT.shape)
        first = jnp.where(is_bad_RxT, place_RxT, weight_RxT.size).min()
        weights[site] = jnp.where(is_bad_RxT, 0, weight_RxT)
        nonfinite[site] = Nonfinite(is_bad_RxT.sum(dtype=jnp.int32), first)
    return slots.replace(weight=weights), nonfinite


def train(
    plan: Plan, mesh: jax.sharding.Mesh, state: State, batches: shuffle_buffer.Slots
) -> tuple[dict[str, bank.State], dict[str, objectives.BatchSums]]:
    """K updates of every bank, one after the other; the sums of each batch are returned stacked on axis K."""
    first_update = state.draws * plan.updates_per_step

    def body(banks: dict[str, bank.State], xs: tuple) -> tuple:
        k, batch = xs
        made = {}
        for b in plan.banks:
            with jax.named_scope(b.name):
                made[b.name] = bank.update(
                    b,
                    plan.optimizer,
                    mesh,
                    state.normalizers,
                    banks[b.name],
                    batch,
                    first_update + k,
                    plan.total_updates,
                )
        # Which latents fired is counted in the state, and too large to stack.
        sums = {name: sums.replace(fired_M=None) for name, (_, sums) in made.items()}
        return {name: new for name, (new, _) in made.items()}, sums

    return jax.lax.scan(body, dict(state.banks), (jnp.arange(plan.updates_per_step), batches))


def measure(
    plan: Plan, mesh: jax.sharding.Mesh, state: State, slots: shuffle_buffer.Slots
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """L0 and FVU [E] of every bank, without padding, on activations as `harvest` gives them."""
    batches = jax.tree.map(lambda value: shuffle_buffer.deal(value, plan.updates_per_step), slots)

    def body(carry: None, batch: shuffle_buffer.Slots) -> tuple:
        made = {
            b.name: bank.measure(b, mesh, state.normalizers, state.banks[b.name].params, batch)
            for b in plan.banks
        }
        return carry, made

    _, sums = jax.lax.scan(body, None, batches)
    found = {b.name: bank.l0_and_fvu(sums[b.name]) for b in plan.banks}
    return {b.name: tuple(value_E[: len(b.members)] for value_E in found[b.name]) for b in plan.banks}


def make_step(plan: Plan) -> Callable[[State, Batch, Gemma], tuple[State, Metrics]]:
    """The step as a function (state, batch, gemma) → (state, metrics), to be jitted with state donated."""
    k, groups = plan.updates_per_step, plan.ring_groups

    def step(state: State, batch: Batch, gemma: Gemma) -> tuple[State, Metrics]:
        draining = state.harvests >= plan.harvests
        occupancy = state.harvests - state.draws
        drawing = draining | (occupancy == plan.ring_steps)

        with jax.named_scope("ring_draw"):
            key = jax.random.wrap_key_data(state.key)
            index_RxT = shuffle_buffer.choose_slots(
                state.ring, key, plan.activations // groups, state.step, occupancy, draining
            )
            drawn = shuffle_buffer.gather(state.ring.slots, index_RxT)

        def run_gemma() -> tuple[shuffle_buffer.Slots, dict[str, Nonfinite]]:
            with jax.named_scope("gemma"):
                new = harvest(gemma, batch, state.normalizers, plan.sites, groups, plan.masked_prefix)
                return leave_out(new)

        def run_nothing() -> tuple[shuffle_buffer.Slots, dict[str, Nonfinite]]:
            none = jnp.zeros((), jnp.int32)
            return jax.tree.map(jnp.zeros_like, drawn), {str(s): Nonfinite(none, none) for s in plan.sites}

        new, nonfinite = jax.lax.cond(draining, run_nothing, run_gemma)
        with jax.named_scope("ring_write"):
            slots = shuffle_buffer.scatter(state.ring.slots, index_RxT, new)

        batches = jax.tree.map(lambda value: shuffle_buffer.deal(value, k), drawn)

        def run_banks() -> tuple:
            with jax.named_scope("banks"):
                return train(plan, gemma.mesh, state, batches)

        def skip_banks() -> tuple:
            sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run_banks)[1])
            return dict(state.banks), sums

        banks, sums = jax.lax.cond(drawing, run_banks, skip_banks)

        harvests = state.harvests + ~draining
        fills = state.fills + ~drawing
        is_full = harvests - (state.step + 1 - fills) == plan.ring_steps
        new_state = state.replace(
            step=state.step + 1,
            harvests=harvests,
            fills=fills,
            banks=banks,
            ring=shuffle_buffer.Ring(slots, jnp.where(is_full, harvests, state.ring.last_full)),
        )
        last_update = state.draws * k + k - 1
        metrics = Metrics(
            trained=drawing,
            nonfinite=nonfinite,
            banks={
                b.name: bank.metrics(
                    b, plan.optimizer, banks[b.name], sums[b.name], last_update, plan.total_updates
                )
                for b in plan.banks
            },
            source_Bx3=batches.source[0],
            weight_B=batches.weight[str(plan.sites[0])][0],
        )
        return new_state, metrics

    return step
