"""The training loop: calibrate, compile once, step, log, checkpoint, export."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorboardX
import tqdm
from gemma import gm

from gemma_scope_jax import checkpoint, data, gemma, interrupt, ring, sae, sharding, step, tokenizer, weights
from gemma_scope_jax import config as config_lib
from gemma_scope_jax.formats import files, gemma_scope, saelens


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


def calibrate(run: Run, rows: data.Rows, gemma_params: dict) -> dict[str, step.Normalizer]:
    """Each site's normaliser, from the first rows of the training order."""
    config, count = run.config, run.config.train.sequences_per_step

    @jax.jit
    def read(params: dict, tokens_SxL: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        values = gemma.read_sites(run.model, params, tokens_SxL, run.plan.sites)
        weight_T = gemma.is_kept(tokens_SxL, run.plan.masked_prefix).reshape(-1).astype(jnp.float32)
        return {str(site): v.reshape(weight_T.size, -1) for site, v in values.items()}, weight_T

    parts = [
        read(gemma_params, read_batch(run, rows, start, count).tokens_SxL)
        for start in range(0, max(config.normalizer.rows, 1), count)
    ]
    weight_N = jnp.concatenate([weight_T for _, weight_T in parts])
    measure = jax.jit(step.calibrate, static_argnames=("center", "outlier_medians"))
    return {
        site: measure(
            jnp.concatenate([values[site] for values, _ in parts]),
            weight_N,
            center=config.normalizer.center,
            outlier_medians=config.normalizer.outlier_medians,
        )
        for site in parts[0][0]
    }


def init_state(run: Run, normalizers: dict[str, step.Normalizer]) -> step.State:
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
        normalizers[str(site)] = step.Normalizer(vector, scalar, scalar, vector)
    abstract = jax.eval_shape(
        lambda n: step.init_state(run.plan, n, config_lib.dtype(run.config)), normalizers
    )
    placed = sharding.shardings(run.mesh, sharding.state_specs(abstract))
    return jax.tree.map(lambda leaf, s: shape(leaf.shape, leaf.dtype, sharding=s), abstract, placed)


def lower_step(run: Run, state: step.State, batch: step.Batch, gemma_params: dict) -> jax.stages.Lowered:
    """The step of a run, lowered for arrays or for shapes with shardings."""
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    fn = step.make_step(run.plan, run.mesh, run.model, config_lib.dtype(run.config))
    return jax.jit(fn, donate_argnums=0, out_shardings=(out, None)).lower(state, batch, gemma_params)


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


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The entries of `metrics.jsonl`; a last line that a killed process left unfinished is passed over.

    Raises:
      ValueError: another line is damaged.
    """
    path, entries = workdir / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}:{number} is damaged; mend the line or move the file away"
                ) from error
    return entries


class MetricsLog:
    """`metrics.jsonl` and TensorBoard. Steps after `last_step` are dropped, they will be done again."""

    def __init__(self, workdir: pathlib.Path, last_step: int) -> None:
        path = workdir / "metrics.jsonl"
        kept = [json.dumps(entry) + "\n" for entry in read_metrics(workdir) if entry["step"] <= last_step]
        with files.replacing_file(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        for name, values in entry["sae"].items():
            for key, value in values.items():
                self._board.add_scalar(f"{name}/{key}", value, entry["step"])
        for key in ("learning_rate", "tokens_per_second"):
            self._board.add_scalar(key, entry[key], entry["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def same_document_share(source_Bx3: np.ndarray, weight_B: np.ndarray) -> float:
    """The share of pairs in a batch that come from one document."""
    _, counts = np.unique(source_Bx3[weight_B > 0, ring.DOCUMENT], return_counts=True)
    total = counts.sum()
    return float((counts * (counts - 1)).sum() / max(total * (total - 1), 1))


def shuffle_quality(workdir: pathlib.Path, rows: data.Rows, sample: int = 4096) -> tuple[float, float]:
    """The share of same-document pairs in a batch, in the run's log and (estimated) under a perfect shuffle."""
    logged = [entry["same_document_pairs"] for entry in read_metrics(workdir) if entry["sae"]]
    count = min(sample, len(rows))
    first_documents = rows.read(data.order(len(rows), 0, 0, count)).first_document
    _, counts = np.unique(first_documents, return_counts=True)
    pairs_of_rows = (counts * (counts - 1)).sum() / max(count * (count - 1), 1)
    return float(np.mean(logged)), float(pairs_of_rows + 1 / len(rows))


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second process from training in the same directory; the lock ends with the process."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {workdir}; wait for it or stop it first"
            ) from error
        yield


def _start_or_continue(
    run: Run, workdir: pathlib.Path, manager: ocp.CheckpointManager, interrupts: interrupt.Interrupts
) -> tuple[step.State, data.Rows]:
    """Trains from the newest checkpoint, or from nothing, until complete or interrupted."""
    config = run.config
    state = None
    if manager.all_steps():
        config_lib.check_resumable(read_config(workdir), config)
        state = checkpoint.restore_newest(manager, abstract_state(run), set_aside=True)
        print(f"Continuing from step {int(state.step)}.", flush=True)
        interrupts.forbid_saving(f"checkpoint {int(state.step)} is the newest state there is")
    folder = run_rows(config, workdir) if state is not None else prepare_rows(config)
    rows = data.open_rows(folder, data.TRAIN)
    gemma_params = load_gemma(run).params if state is None or steps_left(run.plan, state) else None
    # Only now has everything been read that a mistake in the config could spoil.
    with files.replacing_file(workdir / "config.json") as partial:
        partial.write_text(json.dumps(config_lib.to_dict(config), indent=1) + "\n", encoding="utf-8")
    with files.replacing_file(workdir / "rows") as partial:
        partial.write_text(data.name_of(folder) + "\n", encoding="utf-8")
    if state is None:
        state = init_state(run, calibrate(run, rows, gemma_params))
    if gemma_params is not None:
        state = _loop(run, workdir, rows, gemma_params, state, manager, interrupts)
    return state, rows


def train(config: config_lib.Config, workdir: pathlib.Path) -> int:
    """Trains, or continues, the run in `workdir`; returns the exit code: 0 when it is complete.

    Raises:
      ValueError: the config does not fit itself, its inputs, or the run that is in `workdir`.
      FloatingPointError: a loss is not finite.
    """
    run = build(config)
    with _locked(workdir), contextlib.closing(interrupt.Interrupts()) as interrupts:
        # Leaving the block waits for a save that is under way, whatever the reason for leaving.
        with checkpoint.open_manager(workdir / "checkpoints", config.log.keep_checkpoints) as manager:
            state, rows = _start_or_continue(run, workdir, manager, interrupts)
        interrupts.forbid_saving(
            "the training is saved"
        )  # Before looking, so that no signal is promised a save.
        if interrupts.received is not None:
            print(
                f"Saved step {int(state.step)} in {workdir}. To go on, run the same command again.",
                flush=True,
            )
            return 128 + interrupts.received
        ours, perfect = shuffle_quality(workdir, rows)
        print(
            f"Pairs from one document in a batch: {ours:.3%}; in a perfect shuffle: {perfect:.3%}.",
            flush=True,
        )
        export(run, state, workdir / "sae", data.name_of(rows.folder))
        return 0


def _loop(
    run: Run,
    workdir: pathlib.Path,
    rows: data.Rows,
    gemma_params: dict,
    state: step.State,
    manager: ocp.CheckpointManager,
    interrupts: interrupt.Interrupts,
) -> step.State:
    """Steps until the ring is drained, or a signal was received; either way the state returned is saved."""
    config, plan = run.config, run.plan
    sequences = config.train.sequences_per_step
    first_step, left = int(state.step), steps_left(plan, state)
    harvests = int(state.harvests)
    log = MetricsLog(workdir, first_step)
    batch = read_batch(run, rows, harvests * sequences, sequences)
    print("Compiling the step.", flush=True)
    compiled = lower_step(run, state, batch, gemma_params).compile()

    bar = tqdm.tqdm(
        total=first_step + left, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1
    )
    clock = time.perf_counter()
    pending = None  # Metrics are fetched one step late, so that the host never waits for the newest step.

    def flush(now: tuple[int, step.Metrics] | None) -> None:
        nonlocal pending, clock
        if pending is not None:
            number, metrics = pending
            metrics = jax.device_get(metrics)
            before, clock = clock, time.perf_counter()
            entry = _entry(plan, number, metrics, plan.activations / (clock - before))
            log.write(entry)
            first = next(iter(entry["sae"].values()), None)
            postfix = f"{entry['tokens_per_second']:,.0f} tok/s"
            if first:
                postfix += (
                    f", L0 {first['l0']:.1f}, FVU {first['fvu']:.3f}, dead {first['dead_fraction']:.1%}"
                )
            bar.set_postfix_str(postfix, refresh=False)
            bar.update()
        pending = now

    interrupts.allow_saving()
    try:
        for number in range(first_step + 1, first_step + left + 1):
            state, metrics = compiled(state, batch, gemma_params)
            harvests = min(harvests + 1, plan.harvests)
            if harvests < plan.harvests:
                batch = read_batch(run, rows, harvests * sequences, sequences)
            flush((number, metrics))
            stopping = interrupts.received is not None
            if number % config.log.checkpoint_every == 0 or number == first_step + left or stopping:
                flush(None)
                checkpoint.save(manager, state, config_lib.to_dict(config))
                clock = time.perf_counter()  # Saving is no part of the next step's speed.
            if stopping:
                break
        flush(None)
    finally:
        bar.close()
        log.close()
    return state


def _entry(plan: step.Plan, number: int, m: step.Metrics, tokens_per_second: float) -> dict:
    """One line of `metrics.jsonl`. While the ring fills there is nothing to say of the SAEs."""
    saes = {}
    if m.trained:
        for i, member in enumerate(plan.members):
            saes[member.name] = {
                "loss": float(m.loss_E[i]),
                "l0": float(m.l0_E[i]),
                "fvu": float(m.fvu_E[i]),
                "dead_fraction": float(m.dead_fraction_E[i]),
                "activations": int(m.activations_E[i]),
                "sparsity_coefficient": float(m.sparsity_warmup) * member.sparsity_coefficient,
            }
            if not np.isfinite(m.loss_E[i]):
                raise FloatingPointError(
                    f"the loss of {member.name} is {m.loss_E[i]} at step {number}; the last good state is in the "
                    "newest checkpoint. In another --workdir, lower optimizer.learning_rate or set "
                    "normalizer.outlier_medians"
                )
    return {
        "step": number,
        "learning_rate": float(m.learning_rate),
        "tokens_per_second": tokens_per_second,
        "same_document_pairs": same_document_share(m.source_Bx3, m.weight_B) if m.trained else None,
        "sae": saes,
    }


def folded_saes(run: Run, state: step.State) -> dict[str, sae.SAE]:
    """Each member on raw activations, on the host."""
    folded = {}
    for i, member in enumerate(run.plan.members):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], state.params)
        normalizer = state.normalizers[str(member.site)]
        with jax.default_matmul_precision("highest"):
            folded[member.name] = jax.device_get(sae.fold(params, normalizer.mean_D, normalizer.scale))
    return folded


def export(
    run: Run, state: step.State, folder: pathlib.Path, rows: str, file_format: str = "saelens"
) -> list[pathlib.Path]:
    """Writes every member to `folder/<name>/`, as a SAELens folder or Gemma Scope's npz; returns the paths.

    `rows` names the dataset that the run was trained on.
    """
    paths = []
    for (name, folded), member in zip(folded_saes(run, state).items(), run.plan.members, strict=True):
        if file_format == "gemma_scope":
            path = folder / name / "params.npz"
            gemma_scope.write(path, folded)
        else:
            path = folder / name
            about = saelens.About(
                model_name=gemma.spec(run.config.model).hugging_face,
                hook_name=gemma.hook_name(member.site),
                context_length=run.config.data.context_length,
                text=run.config.data.text,
                held_out_fraction=run.config.data.held_out_fraction,
                data_seed=run.config.data.seed,
                chat_template=run.config.data.chat_template,
                rows=rows,
                weights=run.config.weights,
                tokenizer=run.config.tokenizer,
                gemma_dtype=run.config.gemma_dtype,
            )
            saelens.write(path, folded, about, state.normalizers[str(member.site)].ablation_mean_D)
        paths.append(path)
        print(f"Exported {path}", flush=True)
    return paths


def open_run(workdir: pathlib.Path) -> tuple[Run, step.State]:
    """A run directory's run on one device, and the state of its newest whole checkpoint; changes nothing.

    Raises:
      ValueError: the directory holds no run, or no checkpoint that can be read.
    """
    config = read_config(workdir)
    run = build(config, sharding.make_mesh(1, 1, jax.devices()[:1]))
    # The run may have been on more devices: its bank is padded for those.
    padded = config_lib.padded(len(run.plan.members), config.mesh.data)
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, padded_members=padded))
    with checkpoint.open_reader(workdir / "checkpoints") as manager:
        state = checkpoint.restore_newest(manager, abstract_state(run), set_aside=False)
    if state is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    if steps_left(run.plan, state):
        print(f"The run is not complete: this is step {int(state.step)}.", flush=True)
    return run, state


def export_run(workdir: pathlib.Path, file_format: str, out: pathlib.Path) -> list[pathlib.Path]:
    """Exports the newest state of a run directory."""
    run, state = open_run(workdir)
    return export(run, state, out, data.name_of(run_rows(run.config, workdir)), file_format)
