"""The training loop: calibrate, compile once, step, log, checkpoint, export."""

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
    """The normalisers of some sites, from the first rows of the training order.

    Raises:
      ValueError: nothing can be learned of a site's activations: none counts, or all are zero or the same.
      FloatingPointError: one is not finite, and `normalizer.skip_nonfinite` is off.
    """
    if not sites:
        return {}
    config, count = run.config, run.config.train.sequences_per_step

    @jax.jit
    def read(gemma: Gemma, tokens_SxL: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        values = forward.read_sites(gemma, tokens_SxL, sites)
        weight_T = masking.is_kept(tokens_SxL, run.plan.masked_prefix).reshape(-1).astype(jnp.float32)
        return {str(site): v.reshape(weight_T.size, -1) for site, v in values.items()}, weight_T

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
            f"with normalizer.outlier_medians = {config.normalizer.outlier_medians:g} the scale of {site}",
            scale,
            ranges.POSITIVE,
        )
    return made


def nonfinite_text(run: runs.Run, rows: token_rows.Rows, site: str, count: int, place: int) -> str:
    """Which activations are not finite: how many of a site, and where the first is in the training order."""
    length = run.config.data.context_length
    (row,) = token_rows.order(len(rows), run.config.seed, place // length, 1)
    others = f" and {count - 1:,} more" if count > 1 else ""
    return f"the activation of {site} at row {row}, position {place % length}{others} is not finite"


def _tell_nonfinite(config: config_lib.Config, text: str) -> None:
    if not config.normalizer.skip_nonfinite:
        raise NonFiniteError(
            f"{text}: NaN, or too large for its square. To leave such positions out, run the same command with "
            "--normalizer.skip-nonfinite; what was saved before is good. Where there are many, look at "
            "the weights and at gemma_dtype"
        )
    if distributed.is_first():
        warn(f"{text}. Such positions are left out, as normalizer.skip_nonfinite asks.")


def lower_step(run: runs.Run, state: step.State, batch: step.Batch, gemma: Gemma) -> jax.stages.Lowered:
    """The step of a run, lowered for arrays or for shapes with shardings."""
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    # Metrics whole on every device, so that every host can fetch them.
    metrics = jax.NamedSharding(run.mesh, sharding.REPLICATED)
    fn = step.make_step(run.plan)
    return jax.jit(fn, donate_argnums=0, out_shardings=(out, metrics)).lower(state, batch, gemma)


def compile_step(run: runs.Run) -> jax.stages.Compiled:
    """Compiles the step before anything is loaded; says what memory it needs, and refuses what does not fit.

    Raises:
      ValueError: it does not fit; names the largest part and what to change.
    """
    state, batch, gemma = runs.abstract_inputs(run)
    limit = devices.memory_of(run.mesh.local_devices[0])
    say("Compiling the step.")
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
    """Keeps a second run from training in the same directory; the lock ends with the process."""
    if not distributed.is_first():
        yield
        return
    busy = f"another process is training in {workdir}; wait for it or stop it first"
    with locks.locked(workdir / ".lock", busy):
        yield


def start_from(run: runs.Run, rows: token_rows.Rows, gemma: Gemma) -> step.State:
    """The first state of a run that goes on from the SAEs of a finished one, `config.start_from`.

    SAEs that both name go on as they were, with their optimizer's state; the others begin anew. Rows are read on
    from where that run stopped.

    Raises:
      ValueError: that run is not finished, or differs in more than its banks.
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
    say(f"From {source}: of {count} SAEs {kept} go on, {count - kept} are new.")
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
    """`fresh`, with member i as it was at places[i] of `old` wherever that is not -1."""
    place_E = jnp.array(places + [-1] * (plan.padded_members - len(places)))

    def take(new: jax.Array, before: jax.Array) -> jax.Array:
        taken = place_E.reshape(-1, *[1] * (new.ndim - 1)) >= 0
        return jnp.where(taken, before[jnp.maximum(place_E, 0)], new)

    out = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(lambda *trees: jax.tree.map(take, *trees), out_shardings=out)(fresh, old)


def _start_or_continue(
    run: runs.Run, workdir: pathlib.Path, manager: ocp.CheckpointManager, held: contextlib.ExitStack
) -> tuple[step.State, token_rows.Rows, signals.Request]:
    """Trains from the newest checkpoint, or from nothing, until complete or asked to stop.

    From the first step on `held` holds signals back, since there is something to save.
    """
    config = run.config
    state, request = None, signals.Request()
    if manager.all_steps():
        config_lib.check_resumable(loading.run_config(workdir), config)
        state = runs.restore(run, manager, set_aside=True)
        say(f"Continuing from step {int(state.step)}.")
        signals.leaving(f"checkpoint {int(state.step)} is the newest state there is")
    has_work = state is None or runs.steps_left(run.plan, state)
    if has_work:
        # Before an hour is spent on the text.
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
    # Only now has everything been read that a mistake in the config could spoil.
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
        if jax.process_count() == 1:  # Else JAX handles SIGTERM; Ctrl-C ends all, without a save.
            request = held.enter_context(signals.saving())
        state = _loop(run, workdir, rows, compiled, gemma, state, manager, request, measure)
    return state, rows, request


def _passes(run: runs.Run, rows: int) -> list[str]:
    """What to say where the run reads rows of its text more than once."""
    config, length = run.config, run.config.data.context_length
    said = []
    if (read := run.plan.harvests * config.train.sequences_per_step) > rows:
        said.append(
            f"train.tokens is {config.train.tokens:,} and the text has {rows * length:,} positions: each row is read "
            f"{read / rows:.3g} times."
        )
    if config.normalizer.rows > rows:
        said.append(
            f"normalizer.rows is {config.normalizer.rows:,} and the text has {rows:,}: some are measured twice."
        )
    return said


def _started(config: config_lib.Config, workdir: pathlib.Path) -> config_lib.Config | None:
    """The config of the run that goes on, in `workdir` or as another's `start_from`; None: this one is new."""
    goes_on = [
        path for path in (workdir, files.expanded(config.start_from or workdir)) if loading.is_run(path)
    ]
    return loading.run_config(goes_on[0]) if goes_on else None


def train(config: config_lib.Config, workdir: pathlib.Path) -> runs.Run:
    """Trains, or continues, the run in `workdir` until it is complete.

    Raises:
      KeyboardInterrupt: it was interrupted; from the first step on it has saved its state (`signals.Interrupted`).
      ValueError: the config does not fit itself, its inputs, or the run that is in `workdir`.
      FloatingPointError: a loss is not finite.
    """
    run = runs.build(config, started=_started(config, workdir))
    with _locked(workdir):
        with contextlib.ExitStack() as held:
            # Leaving the block waits for a save that is under way, whatever the reason for leaving.
            with checkpoint.open_manager(workdir / "checkpoints", config.log.keep_checkpoints) as manager:
                state, rows, request = _start_or_continue(run, workdir, manager, held)
                checkpoint.check_saved(manager)
            signals.leaving("the training is saved")
        if request.number is not None:
            raise signals.Interrupted(
                request.number,
                f"Saved step {int(state.step)} in {workdir}. To go on, run the same command again.",
            )
        export.write_own(run, state, workdir / "sae", token_rows.name_of(rows.folder))
        if distributed.is_first():
            ours, perfect = metrics_log_lib.shuffle_quality(workdir, rows)
            say(f"Pairs from one document in a batch: {ours:.3%}; in a perfect shuffle: {perfect:.3%}.")
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
    """Steps until the ring is drained, or asked to stop; either way the state returned is saved."""
    config, plan = run.config, run.plan
    sequences = config.train.sequences_per_step
    first_step, left = int(state.step), runs.steps_left(plan, state)
    harvests = int(state.harvests)
    last_harvest = first_step + plan.harvests - harvests
    metrics_log = metrics_log_lib.MetricsLog(workdir, first_step) if distributed.is_first() else None
    is_new = metrics_log is not None and metrics_log.is_new
    batch = runs.read_batch(run, rows, harvests * sequences, sequences)
    youngest = _fewest_updates(plan, state)  # Computed on the state's devices, and so by every process.
    for warning in metrics_log_lib.check_plan(plan, *_to_come(plan, state, youngest)) if is_new else ():
        warn(f"{warning}.")

    bar = reporting.bar("", "step", first_step + left, first_step, speaks=metrics_log is not None)
    watched: list[dict] = []  # The first entries, for a look at what moves the thresholds.
    flops = flops_lib.step_flops(plan, run.module, config.data.context_length)
    chip = devices.chip_of(jax.devices()[0])
    peak = chip.flops * jax.device_count() if chip else None
    clock = time.perf_counter()
    data_wait_s = 0.0
    is_traced = False
    pending = None  # Metrics are fetched one step late, so that the host never waits for the newest step.
    told: set[str] = set()  # What need not be said twice.

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
            # While the ring fills and drains only one of the two computes.
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
                clock = time.perf_counter()  # Saving is no part of the next step's speed.
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
    """Whether this step is to be saved and be the last for now; of many processes the same step on all."""
    if jax.process_count() > 1 and request.number is None and distributed.is_preempted(number):
        request.number = signal.SIGTERM
        say(f"SIGTERM: all hosts save step {number}, then leave.")
    return request.number is not None


def _held_out(
    run: runs.Run, rows: token_rows.Rows, gemma: Gemma, normalizers: dict
) -> Callable[[step.State], dict]:
    """A function from a state to L0 and FVU of its SAEs, by name, on held-out activations.

    Gemma runs once, for it does not change.
    """
    config, plan, mesh = run.config, run.plan, run.mesh
    batch = runs.read_batch(run, rows, 0, config.train.sequences_per_step)

    @functools.partial(jax.jit, out_shardings=jax.NamedSharding(mesh, sharding.TOKENS))
    def harvest(gemma: Gemma, batch: step.Batch, normalizers: dict) -> object:
        new = step.harvest(gemma, batch, normalizers, plan.sites, plan.ring_groups, plan.masked_prefix)
        return step.leave_out(new)[0]

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
    """How many updates the SAE has had that has had fewest; the new one, in a run that goes on from another."""
    return min(int(state.banks[b.name].updates_E[: len(b.members)].min()) for b in plan.banks)


def _to_come(plan: step.Plan, state: step.State, youngest: int) -> tuple[int, float]:
    """All updates that the youngest SAE will have had at the end, and the sum of its learning rates to come."""
    first = int(state.draws) * plan.updates_per_step
    left = max(plan.total_updates - first, 0)
    stride = max(left // 2**20, 1)  # Of a long run an estimate.
    updates = jnp.arange(first, plan.total_updates, stride)
    rates = optimizer.learning_rate(plan.optimizer, plan.total_updates, updates, updates - first + youngest)
    return youngest + left, float(rates.sum()) * stride
