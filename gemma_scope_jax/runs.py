"""What a run is built from: on a mesh, from a config, or from its directory."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
from gemma import gm

from gemma_scope_jax import checkpoint, data, gemma, sharding, step, tokenizer, weights
from gemma_scope_jax import config as config_lib
from gemma_scope_jax import normalizer as normalizer_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is built from; evaluation and export open a finished run as the same thing."""

    config: config_lib.Config
    mesh: jax.sharding.Mesh
    model: gm.nn.Transformer
    plan: step.Plan


def build(config: config_lib.Config, mesh: jax.sharding.Mesh | None = None) -> Run:
    """Checks a config before anything slow is done; lays out the mesh of the config unless one is given."""
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.latent)
    model = gemma.build_model(config.model)
    plan = config_lib.make_plan(config, model, mesh.shape["data"], mesh.shape["latent"])
    config_lib.dtype(config)
    return Run(config, mesh, model, plan)


def prepare_rows(config: config_lib.Config) -> pathlib.Path:
    """The folder of a config's packed rows, made if needed."""

    def load_tokenizer() -> tokenizer.Tokenizer:
        return tokenizer.load(config.model, config.tokenizer, config.weights)

    name = f"{config.model}:{weights.fingerprint(config.tokenizer or config.weights)}"
    return data.prepare(config.data, load_tokenizer, name)


def run_rows(config: config_lib.Config, workdir: pathlib.Path) -> pathlib.Path:
    """The folder of the rows that the run in `workdir` was started with, or those of a new run.

    Raises:
      ValueError: they are no longer cached, and the text has changed since.
    """
    record = workdir / "rows"
    name = record.read_text(encoding="utf-8").strip() if record.exists() else None
    if name is not None and (folder := data.cached(config.data, name)) is not None:
        return folder
    folder = prepare_rows(config)
    if name not in (None, data.name_of(folder)):
        raise ValueError(
            f"data.text {config.data.text!r} or the tokenizer has changed since this run was started, and its rows "
            f"({name}) are no longer in {config.data.folder}; bring back the text, or start another run"
        )
    return folder


def check_weights(run: Run) -> None:
    """Raises ValueError if the weights are not there or not the model's, before an hour is spent on the text."""
    path = gemma.weights_path(run.config.model, run.config.weights)
    weights.find(path, run.model, gemma.depth(run.plan.sites))


def load_gemma(run: Run) -> gemma.Gemma:
    """Gemma up to the deepest site, on the mesh."""
    config = run.config
    placement = sharding.gemma_placement(run.mesh, config.mesh.shard_gemma)
    dtype, depth = config_lib.dtype(config), gemma.depth(run.plan.sites)
    return gemma.load(config.model, config.weights, dtype, depth, placement)


def read_batch(run: Run, rows: data.Rows, start: int, count: int) -> step.Batch:
    """Rows start … start + count of the training order, on the mesh."""
    batch = rows.read(data.order(len(rows), run.config.seed, start, count))
    return sharding.put(run.mesh, step.Batch(batch.tokens, batch.row, batch.first_document), sharding.TOKENS)


def init_state(run: Run, normalizers: dict[str, normalizer_lib.Normalizer]) -> step.State:
    """The first state, every array made in its place on the mesh."""

    def init() -> step.State:
        return step.init_state(run.plan, normalizers, config_lib.dtype(run.config))

    specs = sharding.state_specs(jax.eval_shape(init))
    return jax.jit(init, out_shardings=sharding.shardings(run.mesh, specs))()


def abstract_state(run: Run) -> step.State:
    """The shapes and shardings of the state; nothing is computed."""
    shape = jax.ShapeDtypeStruct
    normalizers = {}
    for site in run.plan.sites:
        width = gemma.site_width(run.model, site)
        vector, scalar = shape((width,), jnp.float32), shape((), jnp.float32)
        normalizers[str(site)] = normalizer_lib.Normalizer(vector, scalar, scalar, vector)
    abstract = jax.eval_shape(
        lambda n: step.init_state(run.plan, n, config_lib.dtype(run.config)), normalizers
    )
    placed = sharding.shardings(run.mesh, sharding.state_specs(abstract))
    return jax.tree.map(lambda leaf, s: shape(leaf.shape, leaf.dtype, sharding=s), abstract, placed)


def abstract_inputs(run: Run) -> tuple[step.State, step.Batch, weights.Params]:
    """What the step takes, as shapes with shardings."""
    config = run.config

    def tokens(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.shardings(run.mesh, sharding.TOKENS))

    count = config.train.sequences_per_step
    batch = step.Batch(tokens(count, config.data.context_length), tokens(count), tokens(count))
    gemma_params = weights.placed_shapes(
        run.model,
        gemma.depth(run.plan.sites),
        config_lib.dtype(config),
        sharding.gemma_placement(run.mesh, config.mesh.shard_gemma),
    )
    return abstract_state(run), batch, gemma_params


def steps_left(plan: step.Plan, state: step.State) -> int:
    """Steps until every activation harvested has been trained on."""
    harvests, occupancy = int(state.harvests), int(state.harvests) - int(state.draws)
    to_harvest = max(plan.harvests - harvests, 0)
    return to_harvest + occupancy + min(plan.ring_steps - occupancy, to_harvest)


def read_config(workdir: pathlib.Path) -> config_lib.Config:
    """The config of a run directory."""
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is no run directory: it has no config.json")
    return config_lib.from_dict(json.loads(path.read_text(encoding="utf-8")))


def open_run(workdir: pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> tuple[Run, step.State]:
    """A run directory's run, and the state of its newest whole checkpoint; changes nothing.

    Args:
      workdir: the run's.
      mesh: to put it on; one device if None. Its `data` axis must divide what each bank was padded to.

    Raises:
      ValueError: the directory holds no run, or no checkpoint that can be read.
    """
    config = read_config(workdir)
    mesh = mesh or sharding.make_mesh(1, 1, jax.devices()[:1])
    run = build(config, mesh)
    # The run may have been on more devices: its banks are padded for those.
    banks = [
        dataclasses.replace(b, padded_members=config_lib.padded(len(b.members), config.mesh.data))
        for b in run.plan.banks
    ]
    for b in banks:
        if b.padded_members % mesh.shape["data"]:
            raise ValueError(
                f"bank {b.name} of {workdir} is padded to {b.padded_members} SAEs, which mesh.data = "
                f"{mesh.shape['data']} does not divide; choose a mesh.data that does"
            )
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, banks=tuple(banks)))
    with checkpoint.open_reader(workdir / "checkpoints") as manager:
        state = checkpoint.restore_newest(manager, abstract_state(run), set_aside=False)
    if state is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    if steps_left(run.plan, state):
        print(f"The run is not complete: this is step {int(state.step)}.", flush=True)
    return run, state
