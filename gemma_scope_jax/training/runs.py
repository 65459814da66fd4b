"""Builds a run from a config, opens it from its directory, restores it on any mesh, and reads its batches."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import token_rows
from gemma_scope_jax.models import placement, registry, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.sites import blocks_needed, check_site, site_width
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.runtime.errors import RunError
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import loading
from gemma_scope_jax.training import bank, checkpoint, plans, shardings, step
from gemma_scope_jax.training import normalizer as normalizer_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's config, mesh, model and plan; also the form in which evaluation and export open a finished run."""

    config: config_lib.Config  # gemma_dtype is a dtype, never "auto".
    mesh: jax.sharding.Mesh
    module: gm.nn.Transformer
    plan: step.Plan


def build(
    config: config_lib.Config,
    mesh: jax.sharding.Mesh | None = None,
    devices: Sequence[jax.Device] | None = None,
    started: config_lib.Config | None = None,
) -> Run:
    """Builds a run from its config, which is checked before anything slow is done.

    Args:
      config: the run's config.
      mesh: the mesh to run on; None: the mesh that the config describes.
      devices: the devices of the mesh that the config describes; None: all devices.
      started: the config that the run was started with, if it is continued; see `plans.make_plan`.
    """
    if mesh is None:
        devices = jax.devices() if devices is None else devices
        data = config.mesh.data or plans.choose_data_axis(config, len(devices))
        mesh = sharding.make_mesh(data, config.mesh.latent, devices)
    dtype = started.gemma_dtype if started and config.gemma_dtype == "auto" else config.gemma_dtype
    config = dataclasses.replace(config, gemma_dtype=registry.dtype_on(mesh.devices.flat[0], dtype))
    module = registry.build_model(config.model)
    plan = plans.make_plan(config, module, mesh.shape["data"], mesh.shape["latent"], started)
    return Run(config, mesh, module, plan)


def gemma_placement(run: Run) -> weights.Placement:
    """The placement of Gemma's parameters on the mesh, up to the deepest site."""
    return placement.placement_of(run.config, run.mesh, run.module, blocks_needed(run.plan.sites))


def check_weights(run: Run) -> None:
    """Raises ValueError if the weights are missing or not the model's, before the text is tokenised."""
    say("Checking Gemma's weights …")
    path = registry.weights_path(run.config.model, run.config.weights)
    weights.find(path, run.module, blocks_needed(run.plan.sites))


def load_gemma(run: Run) -> Gemma:
    """Loads Gemma's blocks up to the deepest site onto the mesh."""
    config = run.config
    dtype, depth = registry.dtype(config), blocks_needed(run.plan.sites)
    return placement.load(config.model, config.weights, dtype, depth, run.mesh, gemma_placement(run))


def read_batch(run: Run, rows: token_rows.Rows, start: int, count: int) -> step.Batch:
    """The rows from `start` to `start + count` of the training order, on the mesh.

    Each host reads only the rows of its own devices.
    """
    order = token_rows.order(len(rows), run.config.seed, start, count)
    placed = jax.NamedSharding(run.mesh, sharding.TOKENS)
    own = np.zeros(count, bool)
    for (places,) in placed.addressable_devices_indices_map((count,)).values():
        own[places] = True
    read = rows.read(order[own])

    def place(values: np.ndarray) -> jax.Array:
        whole = np.zeros((count, *values.shape[1:]), values.dtype)
        whole[own] = values
        return jax.make_array_from_callback(whole.shape, placed, lambda index: whole[index])

    return step.Batch(place(read.tokens), place(read.row), place(read.first_document))


def init_state(run: Run, normalizers: dict[str, normalizer_lib.Normalizer]) -> step.State:
    """The initial state of a run; every array is created on the devices that hold it."""

    say("Initialising the SAEs …")

    def init(normalizers: dict[str, normalizer_lib.Normalizer]) -> step.State:
        return step.init_state(run.plan, normalizers, registry.dtype(run.config))

    out = shardings.state_shardings(run.mesh, jax.eval_shape(init, normalizers))
    return jax.jit(init, out_shardings=out)(normalizers)


def abstract_state(run: Run) -> step.State:
    """The shapes and shardings of the state, without computing it."""
    shape = jax.ShapeDtypeStruct
    normalizers = {}
    for site in run.plan.sites:
        width = site_width(run.module, site)
        vector, scalar = shape((width,), jnp.float32), shape((), jnp.float32)
        normalizers[str(site)] = normalizer_lib.Normalizer(vector, scalar, scalar, vector)
    abstract = jax.eval_shape(lambda n: step.init_state(run.plan, n, registry.dtype(run.config)), normalizers)
    placed = shardings.state_shardings(run.mesh, abstract)
    return jax.tree.map(lambda leaf, s: shape(leaf.shape, leaf.dtype, sharding=s), abstract, placed)


def abstract_inputs(run: Run) -> tuple[step.State, step.Batch, Gemma]:
    """The inputs of the training step, as shapes with shardings."""
    config = run.config

    placed = jax.NamedSharding(run.mesh, sharding.TOKENS)

    def tokens(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)

    count = config.train.sequences_per_step
    batch = step.Batch(tokens(count, config.data.context_length), tokens(count), tokens(count))
    depth = blocks_needed(run.plan.sites)
    params = weights.placed_shapes(run.module, depth, registry.dtype(config), gemma_placement(run))
    return abstract_state(run), batch, Gemma(config.model, run.module, run.mesh, depth, params)


def steps_left(plan: step.Plan, state: step.State) -> int:
    """The number of steps until every activation has been harvested and trained on."""
    harvests, occupancy = int(state.harvests), int(state.harvests) - int(state.draws)
    to_harvest = max(plan.harvests - harvests, 0)
    return to_harvest + occupancy + min(plan.ring_steps - occupancy, to_harvest)


def restore(
    run: Run, manager: ocp.CheckpointManager, set_aside: bool, what: str = "everything"
) -> step.State | None:
    """Restores the newest whole checkpoint on the run's mesh, which can differ from the mesh that saved it.

    Args:
      run: the run.
      manager: the manager of the checkpoints.
      set_aside: whether to move damaged checkpoints; see `checkpoint.restore_newest`.
      what: the parts to restore. "everything"; "banks": all except the ring's slots; "saes": all except the ring's
        slots and the optimizer's state. The parts left out are None.

    Returns:
      The state, or None if there is no checkpoint.
    """

    def abstract(shapes: Mapping[str, list[int]]) -> step.State:
        def as_saved(b: bank.Plan) -> bank.Plan:
            (padded,) = shapes.get(f"banks.{b.name}.updates_E", [b.padded_members])
            return dataclasses.replace(b, padded_members=padded)

        plan = dataclasses.replace(run.plan, banks=tuple(map(as_saved, run.plan.banks)))
        state = abstract_state(dataclasses.replace(run, plan=plan))

        def left_out(part: object) -> object:
            return jax.tree.map(lambda _: None, part)

        if what != "everything":
            state = state.replace(ring=state.ring.replace(slots=left_out(state.ring.slots)))
        if what == "saes":
            banks = {name: b.replace(opt_state=left_out(b.opt_state)) for name, b in state.banks.items()}
            state = state.replace(banks=banks)
        return state

    state = checkpoint.restore_newest(manager, abstract, set_aside)
    if state is None:
        return None
    return state.replace(banks={b.name: _padded(run, b, state.banks[b.name]) for b in run.plan.banks})


def _padded(run: Run, plan: bank.Plan, state: bank.State) -> bank.State:
    """A bank's state, padded for the run's mesh with copies of its last member."""
    if state.updates_E.size == plan.padded_members:
        return state
    place_E = jnp.minimum(jnp.arange(plan.padded_members), len(plan.members) - 1)

    def pad(state: bank.State) -> bank.State:
        return jax.tree.map(lambda leaf: leaf[place_E], state)

    out = shardings.state_shardings(run.mesh, jax.eval_shape(pad, state))
    return jax.jit(pad, out_shardings=out)(state)


def open_run(
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
    what: str = "saes",
    banks: Collection[str] | None = None,
) -> tuple[Run, step.State]:
    """Opens a run directory without changing it.

    Args:
      workdir: the run directory.
      mesh: the mesh to restore the state on; None: one device.
      what: the parts of the state to restore; see `restore`.
      banks: the names of the banks to open; None: all.

    Returns:
      The run, and the state of its newest whole checkpoint.

    Raises:
      ValueError: if the directory holds no run, no such bank, or no checkpoint that can be read.
    """
    config = loading.run_config(workdir)
    if banks is not None:
        opened = {name: b for name, b in config.banks.items() if name in banks}
        if not opened:
            raise RunError(
                f"{workdir} has no bank {' or '.join(map(repr, banks))}; choose one of {', '.join(config.banks)}"
            )
        config = dataclasses.replace(config, banks=opened)
    mesh, module = mesh or sharding.one_device(), registry.build_model(config.model)
    run = Run(config, mesh, module, plans.plan_of(config, mesh.shape["data"]))
    for site in run.plan.sites:
        check_site(module, site)
    say(f"Reading the newest checkpoint of {workdir} …")
    with checkpoint.open_reader(workdir / "checkpoints") as manager:
        state = restore(run, manager, set_aside=False, what=what)
    if state is None:
        raise RunError(f"{workdir} has no checkpoint yet")
    if steps_left(run.plan, state):
        say(f"The run is unfinished: using its step {int(state.step)}.")
    return run, state
