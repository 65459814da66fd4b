"""The compiled training step and the state that it carries.

Tokens → Gemma up to the deepest site → mask and normalise → ring → K updates of each bank of SAEs.

Shapes: S sequences, L context length, T = S·L = K·B activations in a step, B batch, R ring groups, E members.
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
    """The static settings for which the step is compiled."""

    banks: tuple[bank.Plan, ...]
    batch: int  # B
    updates_per_step: int  # K
    harvests: int  # Steps that run Gemma; the later steps drain the ring.
    ring_groups: int
    ring_capacity: int
    optimizer: config.OptimizerConfig
    seed: int
    masked_prefix: int = 0  # Positions masked after each BOS; see `masking.is_kept`.

    @property
    def activations(self) -> int:
        """T, the number of positions harvested in a step."""
        return self.batch * self.updates_per_step

    @property
    def ring_steps(self) -> int:
        """The number of steps whose activations fit in the ring."""
        return self.ring_capacity // self.activations

    @property
    def total_updates(self) -> int:
        return self.harvests * self.updates_per_step

    @property
    def members(self) -> tuple[naming.Member, ...]:
        """The members of all banks."""
        return tuple(member for bank_plan in self.banks for member in bank_plan.members)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The harvested sites, each once even if several SAEs read it."""
        return tuple(dict.fromkeys(site for bank_plan in self.banks for site in bank_plan.sites))


@flax.struct.dataclass
class State:
    """A run's whole training state, carried from step to step and saved in checkpoints."""

    step: jax.Array  # [], int32, completed steps
    harvests: jax.Array  # [], int32, completed steps that ran Gemma
    fills: jax.Array  # [], int32, completed steps that only filled the ring
    banks: Mapping[str, bank.State]  # by name
    ring: shuffle_buffer.Ring
    normalizers: Mapping[str, Normalizer]  # by site
    key: jax.Array  # raw key data, uint32

    @property
    def draws(self) -> jax.Array:
        """The completed steps that updated the banks: all except those that only filled the ring."""
        return self.step - self.fills


@flax.struct.dataclass
class Batch:
    """Rows of packed tokens and their sources."""

    tokens_SxL: jax.Array
    row_S: jax.Array
    first_document_S: jax.Array


@flax.struct.dataclass
class Nonfinite:
    """The unmasked positions of a harvest at which a site's activation is not finite."""

    count: jax.Array  # [], int32
    first: jax.Array  # [], int32, the index in T of the first such position


@flax.struct.dataclass
class Metrics:
    """The metrics of one step."""

    trained: jax.Array  # [], bool: whether the banks were updated
    nonfinite: Mapping[str, Nonfinite]  # in this step's harvest, by site
    banks: Mapping[str, bank.Metrics]
    source_Bx3: jax.Array  # row, position and document of each activation in the first batch
    weight_B: jax.Array  # weights of the first batch at the first site


def init_state(plan: Plan, normalizers: Mapping[str, Normalizer], dtype: jnp.dtype) -> State:
    """The state before the first step. It is traceable, so that `jit` can create it in its sharding.

    Args:
      plan: the run's plan.
      normalizers: from calibration, by site.
      dtype: Gemma's dtype, in which the ring stores activations.
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
    """Runs Gemma up to the deepest site and returns the normalised activations of all positions as ring slots.

    Gemma's weights can be split over the mesh. An activation that is not finite is replaced by zeros. Its weight is
    NaN, or 0 if its position is masked; see `leave_out`.
    """
    tokens_SxL = batch.tokens_SxL
    gemma = gemma.gathered()
    # Each chip keeps its own rows. If the embedding is split, the compiler could otherwise leave the residual stream
    # split by width and gather all rows' activations in every block.
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
    """Sets the weight of activations that are not finite to 0 in the slots from `harvest`.

    Returns:
      The slots, and the number and first position of such activations by site.
    """
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
    """Runs K updates of every bank. Returns the new states, and the sums of each batch stacked on axis K."""
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
        # `fired_M` is already counted in the state, and is too large to stack.
        sums = {name: sums.replace(fired_M=None) for name, (_, sums) in made.items()}
        return {name: new for name, (new, _) in made.items()}, sums

    return jax.lax.scan(body, dict(state.banks), (jnp.arange(plan.updates_per_step), batches))


def measure(
    plan: Plan, mesh: jax.sharding.Mesh, state: State, slots: shuffle_buffer.Slots
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """L0 and FVU, each [E] without padding, of every bank on harvested activations, by the bank's name."""
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
    """Builds the step function (state, batch, gemma) → (state, metrics), to be jitted with `state` donated."""
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
