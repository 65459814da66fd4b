"""The training loop: calibrates, compiles once, runs steps, logs, saves checkpoints and exports."""

import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable, Collection, Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import (
    devices,
    distributed,
    files,
    locks,
    ranges,
    reporting,
    sharding,
    signals,
)
from gemma_scope_jax.runtime.errors import NonFiniteError, RunError
from gemma_scope_jax.runtime.reporting import say, warn
from gemma_scope_jax.saes import loading, verdicts
from gemma_scope_jax.training import bank, checkpoint, export, memory, optimizer, runs, step
from gemma_scope_jax.training import flops as flops_lib
from gemma_scope_jax.training import metrics_log as metrics_log_lib
from gemma_scope_jax.training import normalizer as normalizer_lib


def calibrate(
    run: runs.Run, rows: token_rows.Rows, gemma: Gemma, sites: Collection[Site]
) -> dict[str, normalizer_lib.Normalizer]:
    """Calibrates the normalisers of the given sites on the first rows of the training order.

    Raises:
      ValueError: if a site's activations are all masked, all zero or all the same.
      FloatingPointError: if an activation is not finite and `normalizer.skip_nonfinite` is off.
    """
    if not sites:
        return {}
    config, count = run.config, run.config.train.sequences_per_step

    @jax.jit
    def read(gemma: Gemma, tokens_SxL: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        values = forward.read_sites(gemma, tokens_SxL, sites)
        weight_T = masking.is_kept(tokens_SxL, run.plan.masked_prefix).reshape(-1).astype(jnp.float32)
        return {str(site): v.reshape(weight_T.size, -1) for site, v in values.items()}, weight_T

    say(f"Calibrating on {max(config.normalizer.rows, 1):,} rows of the text, sites: {len(sites)} …")
    parts = [
        read(gemma, runs.read_batch(run, rows, start, count).tokens_SxL)
        for start in range(0, max(config.normalizer.rows, 1), count)
    ]
    weight_N = jnp.concatenate([weight_T for _, weight_T in parts])
    inspect = jax.jit(normalizer_lib.inspect)
    measure = jax.jit(normalizer_lib.calibrate, static_argnames=("center", "outlier_medians"))
    made = {}
    for site in parts[0][0]:
        x_NxD = jnp.concatenate([values[site] for values, _ in parts])
        sample = distributed.fetch(inspect(x_NxD, weight_N))
        normalizer_lib.check(site, sample)
        if sample.nonfinite_N.any():
            first, bad = int(sample.nonfinite_N.argmax()), int(sample.nonfinite_N.sum())
            _tell_nonfinite(config, nonfinite_text(run, rows, site, bad, first))
        made[site] = measure(
            x_NxD,
            weight_N,
            center=config.normalizer.center,
            outlier_medians=config.normalizer.outlier_medians,
        )
        scale = float(distributed.fetch(made[site].scale))
        ranges.check(
            f"the scale of {site} (with normalizer.outlier_medians = {config.normalizer.outlier_medians:g})",
            scale,
            ranges.POSITIVE,
        )
    return made


def nonfinite_text(run: runs.Run, rows: token_rows.Rows, site: str, count: int, place: int) -> str:
    """Says where a site's first activation that is not finite is, by training order, and counts the others."""
    length = run.config.data.context_length
    (row,) = token_rows.order(len(rows), run.config.seed, place // length, 1)
    others = f", nor are {count - 1:,} more" if count > 1 else ""
    return f"the activation of {site} at row {row}, position {place % length} is not finite{others}"


def _tell_nonfinite(config: config_lib.Config, text: str) -> None:
    if not config.normalizer.skip_nonfinite:
        raise NonFiniteError(
            f"{text} (NaN, or too large to be squared). To skip such positions, run the same command with "
            "--normalizer.skip-nonfinite; saved checkpoints are not affected. If there are many, check the weights "
            "and gemma_dtype"
        )
    if distributed.is_first():
        warn(f"{text}. Such positions are skipped, because normalizer.skip_nonfinite is set.")


def lower_step(run: runs.Run, state: step.State, batch: step.Batch, gemma: Gemma) -> jax.stages.Lowered:
    """Lowers the step of a run for arrays, or for shapes with shardings."""
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    # Metrics are replicated, so that every host can fetch them.
    metrics = jax.NamedSharding(run.mesh, sharding.REPLICATED)
    fn = step.make_step(run.plan)
    return jax.jit(fn, donate_argnums=0, out_shardings=(out, metrics)).lower(state, batch, gemma)


def compile_step(run: runs.Run) -> jax.stages.Compiled:
    """Compiles the step before anything is loaded, and reports the memory that it needs.

    Raises:
      ValueError: if the step does not fit in memory. The message says what to change.
    """
    state, batch, gemma = runs.abstract_inputs(run)
    limit = devices.memory_of(run.mesh.local_devices[0])
    say("Compiling the training step …")
    try:
        compiled = lower_step(run, state, batch, gemma).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(memory.too_large(state, gemma, limit)) from error
    needs = memory.needs(state, gemma, compiled.memory_analysis().temp_size_in_bytes)
    memory.check(needs, limit)
    say(memory.describe(needs, limit))
    return compiled


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second run from training in the same directory. The lock ends with the process."""
    if not distributed.is_first():
        yield
        return
    busy = f"another process is training in {workdir}; wait for it or stop it first"
    with locks.locked(workdir / ".lock", busy):
        yield


def start_from(run: runs.Run, rows: token_rows.Rows, gemma: Gemma) -> step.State:
    """The first state of a run that continues the SAEs of a finished run, `config.start_from`.

    SAEs in both runs keep their parameters and optimizer state. The other SAEs of the new run start from scratch.
    Reading continues at the row where the old run stopped.

    Raises:
      ValueError: if the old run is not finished, or differs in more than its banks.
    """
    source = run.config.start_from
    named = [b.name for b in run.plan.banks]
    old_run, old = runs.open_run(files.expanded(source), run.mesh, what="banks", banks=named)
    if runs.steps_left(old_run.plan, old):
        raise RunError(f"start_from: the run in {source} is not complete; finish it first")
    new_sites = [site for site in run.plan.sites if str(site) not in old.normalizers]
    known = {str(site): old.normalizers[str(site)] for site in run.plan.sites if str(site) in old.normalizers}
    fresh = runs.init_state(run, known | calibrate(run, rows, gemma, new_sites))
    merged = dict(fresh.banks)
    kept = 0
    for plan in run.plan.banks:
        old_plan = next((b for b in old_run.plan.banks if b.name == plan.name), None)
        old_names = [member.name for member in old_plan.members] if old_plan else []
        places = [old_names.index(m.name) if m.name in old_names else -1 for m in plan.members]
        kept += sum(place >= 0 for place in places)
        if any(place >= 0 for place in places):
            merged[plan.name] = _take(run, plan, fresh.banks[plan.name], old.banks[plan.name], places)
    count = len(run.plan.members)
    say(f"Starting from {source}: {kept} of {count} SAEs continue, {count - kept} are new.")
    return fresh.replace(
        step=old.step,
        harvests=old.harvests,
        fills=old.fills,
        key=old.key,
        banks=merged,
        ring=fresh.ring.replace(last_full=old.ring.last_full),
    )


def _take(
    run: runs.Run, plan: bank.Plan, fresh: bank.State, old: bank.State, places: list[int]
) -> bank.State:
    """`fresh`, with member i replaced by member places[i] of `old` unless that is -1."""
    place_E = jnp.array(places + [-1] * (plan.padded_members - len(places)))

    def take(new: jax.Array, before: jax.Array) -> jax.Array:
        taken = place_E.reshape(-1, *[1] * (new.ndim - 1)) >= 0
        return jnp.where(taken, before[jnp.maximum(place_E, 0)], new)

    out = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(lambda *trees: jax.tree.map(take, *trees), out_shardings=out)(fresh, old)


def _start_or_continue(
    run: runs.Run, workdir: pathlib.Path, manager: ocp.CheckpointManager, held: contextlib.ExitStack
) -> tuple[step.State, token_rows.Rows, signals.Request]:
    """Trains from the newest checkpoint, or from the start, until the run is complete or asked to stop.

    From the first step on, `held` delays signals until the state has been saved.
    """
    config = run.config
    state, request = None, signals.Request()
    if manager.all_steps():
        config_lib.check_resumable(loading.run_config(workdir), config)
        say("Restoring the newest checkpoint …")
        state = runs.restore(run, manager, set_aside=True)
        say(f"Continuing from step {int(state.step)}.")
        signals.leaving(f"checkpoint {int(state.step)} is the newest saved state")
    has_work = state is None or runs.steps_left(run.plan, state)
    if has_work:
        # Check memory and weights first, because preparing the text can take an hour.
        state_shapes, _, gemma = runs.abstract_inputs(run)
        limit = devices.memory_of(run.mesh.local_devices[0])
        memory.check(memory.needs(state_shapes, gemma, 0), limit)
        runs.check_weights(run)
    if state is not None:
        folder = prepare.rows_of_run(config, workdir)
    elif config.start_from:
        old_config = loading.run_config(files.expanded(config.start_from))
        config_lib.check_startable(old_config, config)
        folder = prepare.rows_of_run(config, files.expanded(config.start_from))
    else:
        folder = prepare.rows_of_once(config)
    rows = token_rows.open_rows(folder, token_rows.TRAIN)
    compiled = compile_step(run) if has_work else None
    gemma = runs.load_gemma(run) if has_work else None
    for sentence in _passes(run, len(rows)) if has_work else ():
        say(sentence)
    if state is None and config.start_from:
        state = start_from(run, rows, gemma)
    # The config is written only now, after everything that a mistake in it could break has been read.
    if distributed.is_first():
        files.write_json(workdir / "config.json", config_lib.to_dict(config))
        files.write_text(workdir / "rows", token_rows.name_of(folder) + "\n")
    if state is None:
        state = runs.init_state(run, calibrate(run, rows, gemma, run.plan.sites))
    if has_work:
        measure = None
        if config.log.evaluate_every:
            held_out_rows = token_rows.open_rows(folder, token_rows.HELD_OUT)
            measure = _held_out(run, held_out_rows, gemma, state.normalizers)
        if jax.process_count() == 1:  # With more, JAX handles SIGTERM, and Ctrl-C ends all without a save.
            request = held.enter_context(signals.saving())
        state = _loop(run, workdir, rows, compiled, gemma, state, manager, request, measure)
    return state, rows, request


def _passes(run: runs.Run, rows: int) -> list[str]:
    """The messages for a run that reads rows of its text more than once."""
    config, length = run.config, run.config.data.context_length
    said = []
    if (read := run.plan.harvests * config.train.sequences_per_step) > rows:
        said.append(
            f"train.tokens is {config.train.tokens:,} and the text has {rows * length:,} positions: each row is read "
            f"{read / rows:.3g} times on average."
        )
    if config.normalizer.rows > rows:
        said.append(
            f"normalizer.rows is {config.normalizer.rows:,} and the text has {rows:,} rows: some are used more than "
            "once."
        )
    return said


def _started(config: config_lib.Config, workdir: pathlib.Path) -> config_lib.Config | None:
    """The config of the run to continue, in `workdir` or in `start_from`; None for a new run."""
    goes_on = [
        path for path in (workdir, files.expanded(config.start_from or workdir)) if loading.is_run(path)
    ]
    return loading.run_config(goes_on[0]) if goes_on else None


def train(config: config_lib.Config, workdir: pathlib.Path) -> runs.Run:
    """Trains the run in `workdir`, or continues it, until it is complete.

    Raises:
      KeyboardInterrupt: if interrupted. From the first step on, the state is saved before (`signals.Interrupted`).
      ValueError: if the config is inconsistent, or does not fit its inputs or the run in `workdir`.
      FloatingPointError: if a loss is not finite.
    """
    run = runs.build(config, started=_started(config, workdir))
    config = run.config
    with _locked(workdir):
        with contextlib.ExitStack() as held:
            # The end of this block waits for a save in progress, even after an error.
            with checkpoint.open_manager(workdir / "checkpoints", config.log.keep_checkpoints) as manager:
                state, rows, request = _start_or_continue(run, workdir, manager, held)
                say("Finishing the checkpoint …")
                checkpoint.check_saved(manager)
            signals.leaving("the trained state is saved")
        if request.number is not None:
            raise signals.Interrupted(
                request.number,
                f"Saved step {int(state.step)} in {workdir}. To continue, run the same command again.",
            )
        export.write_own(run, state, workdir / "sae", token_rows.name_of(rows.folder))
        if distributed.is_first():
            ours, perfect = metrics_log_lib.shuffle_quality(workdir, rows)
            say(f"Same-document pairs in a batch: {ours:.3%}; in a perfect shuffle: {perfect:.3%}.")
            for line in verdicts.lines(metrics_log_lib.judge(run.plan, workdir, int(state.step))):
                say(line)
    return run


def _loop(
    run: runs.Run,
    workdir: pathlib.Path,
    rows: token_rows.Rows,
    compiled: jax.stages.Compiled,
    gemma: Gemma,
    state: step.State,
    manager: ocp.CheckpointManager,
    request: signals.Request,
    measure: Callable[[step.State], dict] | None,
) -> step.State:
    """Runs steps until the ring is drained or a stop is requested. The returned state has been saved."""
    config, plan = run.config, run.plan
    sequences = config.train.sequences_per_step
    first_step, left = int(state.step), runs.steps_left(plan, state)
    harvests = int(state.harvests)
    last_harvest = first_step + plan.harvests - harvests
    metrics_log = metrics_log_lib.MetricsLog(workdir, first_step) if distributed.is_first() else None
    is_new = metrics_log is not None and metrics_log.is_new
    batch = runs.read_batch(run, rows, harvests * sequences, sequences)
    # Every process runs this, because it computes on the state's devices.
    youngest = _fewest_updates(plan, state)
    for warning in metrics_log_lib.check_plan(plan, *_to_come(plan, state, youngest)) if is_new else ():
        warn(f"{warning}.")

    bar = reporting.bar("", "step", first_step + left, first_step, speaks=metrics_log is not None)
    watched: list[dict] = []  # The first log entries, for `stuck_thresholds`.
    flops = flops_lib.step_flops(plan, run.module, config.data.context_length)
    chip = devices.chip_of(jax.devices()[0])
    peak = chip.flops * jax.device_count() if chip else None
    clock = time.perf_counter()
    data_wait_s = 0.0
    is_traced = False
    pending = None  # Metrics are fetched one step late, so that the host never waits for the newest step.
    told: set[str] = set()  # Sites and metrics for which a warning has been given.

    def flush(now: tuple[int, int, step.Metrics, dict | None] | None) -> None:
        nonlocal pending, clock
        if pending is not None:
            number, first_row, metrics, held_out = pending
            metrics = jax.device_get(metrics)
            for site, bad in metrics.nonfinite.items():
                if bad.count and site not in told:
                    place = first_row * config.data.context_length + int(bad.first)
                    text = nonfinite_text(run, rows, site, int(bad.count), place)
                    _tell_nonfinite(config, f"in step {number} {text}")
                    told.add(site)
            before, clock = clock, time.perf_counter()
            of_gemma, of_banks = flops
            # While the ring fills only Gemma computes, and while it drains only the banks do.
            done = of_gemma * (number <= last_harvest), sum(of_banks) * bool(metrics.trained)
            speed = metrics_log_lib.measure_speed(plan, clock - before, data_wait_s, done, peak)
            entry = metrics_log_lib.entry(plan, number, metrics, speed, held_out)
            if metrics_log is not None:
                metrics_log.write(entry)
                for name, text in metrics_log_lib.undefined(entry).items():
                    if name not in told:
                        warn(f"{text}.")
                    told.add(name)
            if is_new and entry["sae"] and len(watched) < metrics_log_lib.watched_steps(plan):
                watched.append(entry)
                if len(watched) == metrics_log_lib.watched_steps(plan):
                    for warning in metrics_log_lib.stuck_thresholds(plan, watched):
                        warn(f"{warning}.")
            bar.set_postfix_str(metrics_log_lib.progress(entry), refresh=False)
            bar.update()
        pending = now

    try:
        for number in range(first_step + 1, first_step + left + 1):
            if number == config.log.profile_from:
                jax.profiler.start_trace(workdir / "profile")
                is_traced = True
            first_row = harvests * sequences
            state, metrics = compiled(state, batch, gemma)
            harvests = min(harvests + 1, plan.harvests)
            started = time.perf_counter()
            if harvests < plan.harvests:
                batch = runs.read_batch(run, rows, harvests * sequences, sequences)
            data_wait_s = time.perf_counter() - started
            is_due = measure is not None and number % config.log.evaluate_every == 0
            flush((number, first_row, metrics, measure(state) if is_due else None))
            if is_traced and number == config.log.profile_from + config.log.profile_steps - 1:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                is_traced = False
            stopping = _is_to_stop(request, number)
            if number % config.log.checkpoint_every == 0 or number == first_step + left or stopping:
                flush(None)
                if metrics_log is not None:
                    metrics_log.sync()
                checkpoint.save(manager, state, config_lib.to_dict(config))
                clock = time.perf_counter()  # Excludes saving from the next step's speed.
            if stopping:
                break
        flush(None)
    finally:
        bar.close()
        if is_traced:
            jax.profiler.stop_trace()
        if metrics_log is not None:
            metrics_log.close()
    return state


def _is_to_stop(request: signals.Request, number: int) -> bool:
    """Whether to save this step and stop after it. All processes stop at the same step."""
    if jax.process_count() > 1 and request.number is None and distributed.is_preempted(number):
        request.number = signal.SIGTERM
        say(f"SIGTERM: all hosts save step {number}, then exit.")
    return request.number is not None


def _held_out(
    run: runs.Run, rows: token_rows.Rows, gemma: Gemma, normalizers: dict
) -> Callable[[step.State], dict]:
    """Returns a function from a state to the L0 and FVU of its SAEs, by name, on held-out activations.

    Gemma runs only once, because its activations do not change.
    """
    config, plan, mesh = run.config, run.plan, run.mesh
    batch = runs.read_batch(run, rows, 0, config.train.sequences_per_step)

    @functools.partial(jax.jit, out_shardings=jax.NamedSharding(mesh, sharding.TOKENS))
    def harvest(gemma: Gemma, batch: step.Batch, normalizers: dict) -> object:
        new = step.harvest(gemma, batch, normalizers, plan.sites, plan.ring_groups, plan.masked_prefix)
        return step.leave_out(new)[0]

    say("Computing the held-out activations for log.evaluate_every …")
    slots = harvest(gemma, batch, normalizers)
    whole = jax.NamedSharding(mesh, sharding.REPLICATED)
    measure = jax.jit(functools.partial(step.measure, plan, mesh), out_shardings=whole)

    def of_state(state: step.State) -> dict[str, dict[str, float]]:
        found = jax.device_get(measure(state.replace(ring=None), slots))
        return {
            member.name: {
                key: metrics_log_lib.finite(found[b.name][k][i]) for k, key in enumerate(("l0", "fvu"))
            }
            for b in plan.banks
            for i, member in enumerate(b.members)
        }

    return of_state


def _fewest_updates(plan: step.Plan, state: step.State) -> int:
    """The number of updates of the SAE with the fewest so far, such as a new SAE in a run with `start_from`."""
    return min(int(state.banks[b.name].updates_E[: len(b.members)].min()) for b in plan.banks)


def _to_come(plan: step.Plan, state: step.State, youngest: int) -> tuple[int, float]:
    """The youngest SAE's total updates at the end of the run, and the sum of its remaining learning rates."""
    first = int(state.draws) * plan.updates_per_step
    left = max(plan.total_updates - first, 0)
    stride = max(left // 2**20, 1)  # Only an estimate for a long run.
    updates = jnp.arange(first, plan.total_updates, stride)
    rates = optimizer.learning_rate(plan.optimizer, plan.total_updates, updates, updates - first + youngest)
    return youngest + left, float(rates.sum()) * stride
