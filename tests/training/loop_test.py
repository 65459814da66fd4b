"""Whole runs: their files, exact resumption after any kind of end, and the handling of signals and bad input."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_scope_jax import config
from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.runtime import devices, sharding
from gemma_scope_jax.saes import jumprelu, loading
from gemma_scope_jax.saes.formats import saelens
from gemma_scope_jax.training import checkpoint, export, loop, runs, step
from gemma_scope_jax.training import metrics_log as log_lib

LONG = dict(train__tokens=128 * 250, log__checkpoint_every=25)


def final_state(run_config, workdir):
    run = runs.build(run_config)
    with checkpoint.open_manager(workdir / "checkpoints", 2) as manager:
        return jax.device_get(runs.restore(run, manager, set_aside=False))


def logged_steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.train(tiny.run_config(inputs, **LONG), workdir)
    return workdir


def test_a_run_directory_is_self_contained(inputs, finished):
    c = tiny.run_config(inputs, **LONG)
    assert loading.run_config(finished) == c
    plan = runs.build(c).plan
    total = plan.harvests + plan.ring_steps
    assert logged_steps(finished) == list(range(1, total + 1))
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "rows", "sae", "tensorboard",
    ]  # fmt: skip
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [250, total]
    assert any((finished / "tensorboard").iterdir())


def test_the_loss_falls(finished):
    losses = [
        next(iter(entry["sae"].values()))["loss"]
        for entry in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
        if entry["sae"]
    ]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


def test_the_export_has_the_training_states_outputs(inputs, finished):
    """Compares on raw activations, without the few positions that have a pre-activation near its threshold."""
    c = tiny.run_config(inputs, **LONG)
    state = final_state(c, finished)
    (folder,) = (finished / "sae").iterdir()
    exported, about = saelens.read(folder)
    assert about.hook_name == "blocks.1.hook_resid_post"
    normalizer = next(iter(state.normalizers.values()))
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), state.banks["main"].params)
    rng = np.random.default_rng(0)
    x = normalizer.mean_D + normalizer.scale * rng.normal(size=(3000, 32)) / np.sqrt(32)
    pre = ((x - normalizer.mean_D) / normalizer.scale - params.b_dec) @ params.W_enc + params.b_enc
    threshold = np.exp(params.log_threshold)
    f = pre * (pre > threshold)
    expected = normalizer.scale * (f @ params.W_dec + params.b_dec) + normalizer.mean_D
    ours = np.asarray(jumprelu.decode(exported, jumprelu.encode(exported, x.astype(np.float32))))
    near = normalizer.scale * np.abs(pre - threshold).min(1) < 1e-5 * np.linalg.norm(x, axis=1)
    error = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert near.mean() < 0.02
    np.testing.assert_array_less(error[~near], 1e-5)
    np.testing.assert_allclose(np.linalg.norm(exported.W_dec, axis=1), 1, atol=1e-5)
    assert (exported.threshold >= 0).all()


def test_a_profile_shows_gemma_the_ring_and_each_bank(inputs, tmp_path):
    bank = dict(layers=(1,), width=64, bandwidth=0.1, initial_threshold=0.1)
    banks = {"first": bank, "second": bank | {"layers": (2,)}}
    c = tiny.run_config(inputs, banks=banks, log__profile_from=6, log__profile_steps=1)
    loop.train(c, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    run = runs.build(c)
    hlo = loop.lower_step(run, *runs.abstract_inputs(run)).as_text(debug_info=True)
    for scope in ("gemma", "ring_draw", "ring_write", "first", "second"):
        assert f"/{scope}/" in hlo
    speed = log_lib.read_metrics(tmp_path / "run")[-1]["speed"]
    assert speed["tokens_per_second"] > 0 and speed["data_wait_s"] >= 0


def test_the_step_is_traced_once_in_a_run(inputs, tmp_path, monkeypatch):
    make_step = step.make_step
    monkeypatch.setattr(step, "make_step", lambda *args: chex.assert_max_traces(make_step(*args), n=1))
    loop.train(tiny.run_config(inputs), tmp_path / "run")


def test_a_finished_run_is_left_unchanged_and_can_be_extended(inputs, tmp_path, capsys, monkeypatch):
    c = tiny.run_config(inputs)
    loop.train(c, tmp_path / "run")
    before = final_state(c, tmp_path / "run")
    (export,) = (tmp_path / "run" / "sae").iterdir()
    (export / "evaluation.json").write_text("an hour's work")
    loop.train(c, tmp_path / "run")
    assert (export / "evaluation.json").read_text() == "an hour's work"
    jax.tree.map(np.testing.assert_array_equal, final_state(c, tmp_path / "run"), before)

    # "auto" keeps the dtype that the run was started with, on whatever machine.
    monkeypatch.setattr(devices, "faster_dtype", lambda device: "bfloat16")
    longer = tiny.run_config(inputs, train__tokens=128 * 30, gemma_dtype="auto")
    longer = loop.train(longer, tmp_path / "run").config
    assert longer.gemma_dtype == loading.run_config(tmp_path / "run").gemma_dtype == "float32"
    assert runs.build(dataclasses.replace(longer, gemma_dtype="auto")).config.gemma_dtype == "bfloat16"
    after = final_state(longer, tmp_path / "run")
    assert int(after.harvests) == int(after.draws) == 30
    assert logged_steps(tmp_path / "run") == list(range(1, int(after.step) + 1))


BANKS = {
    "residual": dict(
        layers=(1,), width=64, bandwidth=0.1, initial_threshold=0.1, sparsity_coefficients=(1e-3, 1e-2, 1e-1)
    )
}


def test_members_are_added_to_and_dropped_from_a_finished_runs_banks(inputs, tmp_path, capsys):
    """Kept members resume as if the new banks had always existed; new members start as in a new run."""
    old = tmp_path / "old"
    c = tiny.run_config(inputs, banks=BANKS)
    loop.train(c, old)
    before = final_state(c, old)
    files_before = {p: p.stat().st_mtime_ns for p in old.rglob("*") if p.is_file()}

    residual = BANKS["residual"] | {"sparsity_coefficients": (1e-2, 1e-3, 3e-2)}
    banks = {"residual": residual, "mlp": residual | {"sites": ("mlp_out",), "layers": (2,)}}
    changes = dict(train__tokens=128 * 16, start_from=str(old), optimizer__learning_rate=1e-3)
    new = tiny.run_config(inputs, banks=banks, **changes)
    loop.train(new, tmp_path / "new")
    assert "2 of 6 SAEs continue, 4 are new." in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in old.rglob("*") if p.is_file()} == files_before
    after = final_state(new, tmp_path / "new")
    assert int(after.harvests) == int(after.draws) == 16
    assert after.banks["residual"].updates_E.tolist() == [64, 64, 24]
    assert after.banks["mlp"].updates_E.tolist() == [24] * 3
    assert logged_steps(tmp_path / "new") == list(range(int(before.step) + 1, int(after.step) + 1))
    old_normalizer, kept = (s.normalizers["layer_1_resid_post"] for s in (before, after))
    jax.tree.map(np.testing.assert_array_equal, old_normalizer, kept)

    # Extending the first run in place trains the same two SAEs.
    longer = tiny.run_config(inputs, banks=BANKS, train__tokens=128 * 16)
    loop.train(longer, old)
    whole = final_state(longer, old).banks["residual"]
    for mine, its in ((0, 1), (1, 0)):
        jax.tree.map(
            lambda a, b, i=mine, j=its: np.testing.assert_allclose(a[i], b[j], rtol=1e-6, atol=1e-6),
            after.banks["residual"],
            whole,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=3, train__tokens=128 * 12), r"the old run had config\.seed = 0, this run has 3"),
        (dict(train__tokens=128 * 10), r"had 1280 tokens and train\.tokens is 1280; raise train"),
        (dict(start_from="nowhere"), "nowhere is not a run directory"),
        (
            dict(train__tokens=128 * 12, banks__main__bandwidth=0.2),
            r"the old run had config\.banks\.main\.bandwidth = 0\.1, this run has 0\.2; restore the old value",
        ),
    ],
)
def test_an_unsuitable_run_to_start_from_is_refused(inputs, tmp_path_factory, changes, message, request):
    old = request.getfixturevalue("short")
    with pytest.raises(ValueError, match=message):
        loop.train(
            tiny.run_config(inputs, **{"start_from": str(old), **changes}),
            tmp_path_factory.mktemp("new") / "run",
        )


@pytest.fixture(scope="module")
def short(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "short"
    loop.train(tiny.run_config(inputs), workdir)
    return workdir


def test_a_run_that_does_not_fit_in_memory_is_refused_before_loading(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "memory_of", lambda device: 1_000_000)
    monkeypatch.setattr(prepare, "rows_of", lambda _: pytest.fail("the text was read"))
    c = tiny.run_config(inputs, banks={"large": dict(layers=(1,), width=2**14)})
    with pytest.raises(
        ValueError,
        match=r"does not fit .*bank large 0\.0\d.* The largest part is bank large: lower banks\.large\.w",
    ):
        loop.train(c, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_another_config_is_refused_and_no_file_changes(inputs, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"config\.banks\.main\.width = 64, now it is 128"):
        loop.train(tiny.run_config(inputs, banks__main__width=128, **LONG), finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def on_devices(patch, count):
    """Makes the next runs use `count` devices."""
    build = runs.build

    def build_on(run_config, started):
        c = run_config.mesh
        return build(run_config, sharding.make_mesh(c.data, c.latent, jax.devices()[:count]), started=started)

    patch.setattr(runs, "build", build_on)


# With three members, a data axis of two or eight needs padding.
THREE = dict(
    banks__main__sparsity_coefficients=(1e-3, 1e-2, 1e-1),
    banks__main__objective="controlled",
    banks__main__target_l0s=(10.0,),
)


@pytest.fixture(scope="module")
def on_four(inputs, tmp_path_factory):
    """The workdir of a run on four devices, and a copy of it after step six."""
    workdir = tmp_path_factory.mktemp("runs") / "on_four"
    save = checkpoint.save

    def save_and_copy(manager, state, run_config):
        save(manager, state, run_config)
        if int(state.step) == 6:
            manager.wait_until_finished()
            shutil.copytree(workdir, workdir.with_name("at_six"))

    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 4)
        patch.setattr(checkpoint, "save", save_and_copy)
        loop.train(tiny.run_config(inputs, **THREE, mesh__data=2, mesh__latent=2), workdir)
    return workdir, workdir.with_name("at_six")


@pytest.mark.parametrize(("count", "mesh"), [(8, (8, 1)), (2, (1, 2))])
def test_a_run_resumes_on_other_devices_with_the_same_results(
    inputs, tmp_path, monkeypatch, on_four, count, mesh
):
    whole, at_six = on_four
    workdir = shutil.copytree(at_six, tmp_path / "run")
    on_devices(monkeypatch, count)
    c = tiny.run_config(inputs, **THREE, mesh__data=mesh[0], mesh__latent=mesh[1])
    loop.train(c, workdir)
    logs = [log_lib.read_metrics(folder) for folder in (whole, workdir)]
    assert len(logs[0]) == len(logs[1]) == 14
    for expected, resumed in zip(*logs, strict=True):
        assert resumed["same_document_pairs"] == expected["same_document_pairs"]
        for name, values in expected["sae"].items():
            np.testing.assert_allclose(resumed["sae"][name]["loss"], values["loss"], rtol=1e-5)
    resumed, expected = (runs.open_run(folder, what="banks")[1].banks["main"] for folder in (workdir, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), resumed, expected)


def test_a_run_of_many_devices_is_read_on_one(inputs, tmp_path):
    """The run has three members, padded to four for a data axis of two."""
    bank = dict(banks__main__sparsity_coefficients=(1e-3, 1e-2, 1e-1), mesh__data=2, mesh__latent=4)
    loop.train(tiny.run_config(inputs, **bank), tmp_path / "run")
    run, state = runs.open_run(tmp_path / "run")
    assert run.mesh.size == 1 and state.banks["main"].params.W_enc.shape[0] == 3
    assert not jax.tree.leaves((state.ring.slots, state.banks["main"].opt_state))  # They are not read.
    assert len(list(export.folded_saes(run.plan, state))) == 3


def test_a_run_keeps_its_rows_when_the_text_changes(inputs, tmp_path, capsys):
    """Documents are held out by their index, so another text would mix the two splits."""
    text = tmp_path / "text.jsonl"
    lines = (inputs / "text.jsonl").read_text()
    text.write_text(lines)
    changes = dict(data__text=str(text), data__folder=str(tmp_path / "cache"))
    loop.train(tiny.run_config(inputs, **changes), tmp_path / "run")
    before = (tmp_path / "run" / "rows").read_text()
    text.write_text(json.dumps({"text": "a document before all others"}) + "\n" + lines)
    longer = tiny.run_config(inputs, train__tokens=128 * 12, **changes)
    loop.train(longer, tmp_path / "run")
    assert (tmp_path / "run" / "rows").read_text() == before
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="has changed since this run was started"):
        loop.train(tiny.run_config(inputs, train__tokens=128 * 14, **changes), tmp_path / "run")


def test_a_config_can_be_corrected_before_the_first_step(inputs, tmp_path):
    with pytest.raises(ValueError, match="no weights at"):
        loop.train(tiny.run_config(inputs, weights=str(tmp_path / "nowhere")), tmp_path / "run")
    loop.train(tiny.run_config(inputs), tmp_path / "run")


def test_wrong_weights_are_refused_before_the_text_is_tokenised(inputs, tmp_path):
    changes = dict(weights=str(tmp_path), data__folder=str(tmp_path / "rows"))
    with pytest.raises(ValueError, match="holds no weights"):
        loop.train(tiny.run_config(inputs, **changes), tmp_path / "run")
    assert not (tmp_path / "rows").exists()


def test_an_old_run_with_an_out_of_range_seed_opens_and_resumes(inputs, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    old = dataclasses.replace(tiny.run_config(inputs, **LONG), seed=2**32)
    (workdir / "config.json").write_text(json.dumps(config.to_dict(old)))
    run, state = runs.open_run(workdir)
    assert run.config.seed == 2**32 and int(state.step) == logged_steps(finished)[-1]
    loop.train(old, workdir)
    with pytest.raises(
        ValueError, match="seed is 4294967296; it must be at least 0 and at most 2,147,483,647"
    ):
        loop.train(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_nonfinite_activation_ends_the_run_with_its_position_or_is_skipped(
    inputs, tmp_path, monkeypatch, capsys
):
    """A token that does not occur in calibration gets a NaN embedding; the run resumes with skip_nonfinite."""
    sites = dict(banks__main__layers=(0,), banks__main__sites=("embed",), log__checkpoint_every=1)
    c = tiny.run_config(inputs, normalizer__rows=8, **sites)
    rows = token_rows.open_rows(prepare.rows_of(c), token_rows.TRAIN)
    order = token_rows.order(len(rows), c.seed, 0, 80)
    tokens = rows.read(order).tokens
    late = sorted({*tokens[16:].flatten().tolist()} - {*tokens[:16].flatten().tolist()})
    place = min(int(np.flatnonzero(tokens.reshape(-1) == token)[0]) for token in late)
    token = tokens.reshape(-1)[place]
    load = runs.load_gemma

    def spoiled(run):
        loaded = load(run)
        table = loaded.params["embedder"]["input_embedding"].at[token].set(jnp.nan)
        return dataclasses.replace(loaded, params=loaded.params | {"embedder": {"input_embedding": table}})

    monkeypatch.setattr(runs, "load_gemma", spoiled)
    at = f"at row {order[place // 16]}, position {place % 16}"
    place_text = f"in step {place // 128 + 1} the activation of embed {at}"
    with pytest.raises(
        FloatingPointError, match=rf"{place_text} is not finite.*NaN.*--normalizer.skip-nonfinite"
    ):
        loop.train(c, tmp_path / "run")
    skips = dataclasses.replace(c, normalizer=dataclasses.replace(c.normalizer, skip_nonfinite=True))
    loop.train(skips, tmp_path / "run")
    entries = log_lib.read_metrics(tmp_path / "run")
    assert sum(entry.get("nonfinite", 0) for entry in entries) == (tokens == token).sum()
    assert all(np.isfinite(value["loss"]) for entry in entries for value in entry["sae"].values())
    assert re.search(rf"{place_text}.*Such positions are skipped", capsys.readouterr().out.replace("\n", " "))


def test_a_short_text_is_reported_with_its_number_of_passes(inputs, tmp_path):
    run = runs.build(tiny.run_config(inputs, train__tokens=128 * 12, normalizer__rows=64))
    assert loop._passes(run, 96) == []
    assert loop._passes(run, 60) == [
        "train.tokens is 1,536 and the text has 960 positions: each row is read 1.6 times on average.",
        "normalizer.rows is 64 and the text has 60 rows: some are used more than once.",
    ]


class Deaf(io.StringIO):
    """A stream whose reader has closed it."""

    def write(self, text=""):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    flush = write


def test_an_interrupt_in_a_notebook_is_raised_after_the_state_is_saved(inputs, tmp_path, monkeypatch):
    """This works with a closed stderr too. On another thread, where Python handles no signals, the run finishes."""
    c = tiny.run_config(inputs)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    read, calls = runs.read_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return read(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="Saved step") as caught:
        patch.setattr(runs, "read_batch", interrupted)
        patch.setattr(sys, "stderr", Deaf())
        loop.train(c, tmp_path / "run")
    assert caught.value.number == signal.SIGINT
    steps = logged_steps(tmp_path / "run")
    assert int(final_state(c, tmp_path / "run").step) == steps[-1] < 14
    assert not (tmp_path / "run" / "sae").exists()

    found = []
    thread = threading.Thread(target=lambda: found.append(loop.train(c, tmp_path / "run")))
    thread.start()
    thread.join()
    assert found[0].config == c and len(logged_steps(tmp_path / "run")) == 14
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_two_processes_do_not_train_in_one_directory(inputs, tmp_path):
    with loop._locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="another process is training in"):
            loop.train(tiny.run_config(inputs), tmp_path / "run")


def test_a_nonfinite_loss_stops_the_run_with_the_step(inputs, tmp_path):
    c = tiny.run_config(inputs, optimizer__learning_rate=1e30)
    with pytest.raises(
        FloatingPointError, match=r"is (nan|inf) at step \d+|non-finite values in banks\.main"
    ):
        loop.train(c, tmp_path / "run")
    state = final_state(c, tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.banks))


def test_the_log_keeps_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "sae": {}}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "los'
    )
    log = log_lib.MetricsLog(tmp_path, 2)
    log.write({"step": 3, "sae": {}, "speed": {"tokens_per_second": 1.0}})
    log.close()
    assert logged_steps(tmp_path) == [1, 2, 3]


def test_the_share_of_same_document_pairs():
    source = np.zeros((6, 3), np.int32)
    source[:, 2] = [5, 5, 5, 7, 8, 8]
    weight = np.array([1, 1, 1, 1, 1, 0])
    assert log_lib.same_document_share(source, weight) == 3 / 10


class Process:
    """A run in a separate process, on eight fake devices as in this one."""

    def __init__(
        self,
        run_config: config.Config,
        workdir: pathlib.Path,
        output: pathlib.Path | None = None,
        program: Sequence[str] = (tiny.__file__,),
        is_piped: bool = False,
    ) -> None:
        given = json.dumps({"config": config.to_dict(run_config), "workdir": str(workdir)})
        self.workdir = workdir
        self.output = output or workdir.with_suffix(".out")
        root = pathlib.Path(__file__).parents[2]
        environment = {"JAX_NUM_CPU_DEVICES": "8", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'tests'}"
        with self.output.open("w") as file:
            self.popen = subprocess.Popen(
                [sys.executable, *program, given],
                stdout=subprocess.PIPE if is_piped else file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert self.popen.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.005)

    def text(self) -> str:
        return self.output.read_text()

    def logged(self, count: int) -> bool:
        path = self.workdir / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= count

    def send(self, number: int) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(timeout=120)


def kill_and_resume(run_config, whole, workdir, kills, seed):
    """Kills and resumes a run `kills` times at random moments, then lets it finish; checks its end."""
    moments = random.Random(seed)
    for _ in range(kills):
        process = Process(run_config, workdir)
        already = len(logged_steps(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        after = min(already + moments.randrange(5, 60), 230)
        process.wait_until(lambda p=process, n=after: p.logged(n))
        time.sleep(0.05 * moments.random())
        assert process.send(signal.SIGKILL) == -signal.SIGKILL
    process = Process(run_config, workdir)
    assert process.popen.wait(timeout=300) == 0, process.text()
    assert_same_end(run_config, whole, workdir)


def assert_same_end(run_config, whole, workdir):
    jax.tree.map(
        np.testing.assert_array_equal, final_state(run_config, workdir), final_state(run_config, whole)
    )
    assert logged_steps(workdir) == logged_steps(whole)
    for path in (whole / "sae").rglob("*.safetensors"):
        assert path.read_bytes() == (workdir / path.relative_to(whole)).read_bytes()


def test_a_killed_and_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(inputs, finished, tmp_path):
    c = tiny.run_config(inputs, **LONG)
    workdir = tmp_path / "run"
    process = Process(c, workdir)
    process.wait_until(lambda: process.logged(60))
    assert process.send(signal.SIGKILL) == -signal.SIGKILL

    process = Process(c, workdir, is_piped=True)
    process.popen.stdout.close()  # Without a reader the run continues, and still handles signals.
    process.wait_until(lambda: process.logged(150))
    assert process.send(signal.SIGINT) == 130
    steps = logged_steps(workdir)
    assert steps == list(range(1, len(steps) + 1))
    assert (workdir / "checkpoints" / str(steps[-1])).exists()

    process = Process(c, workdir)
    assert process.popen.wait(timeout=300) == 0, process.text()
    assert f"Continuing from step {steps[-1]}." in process.text()
    assert_same_end(c, finished, workdir)


def test_a_signal_before_the_first_step_ends_the_run_at_once(inputs, tmp_path):
    process = Process(tiny.run_config(inputs, **LONG), tmp_path / "run")
    process.wait_until(lambda: "Compiling the training step" in process.text())
    started = time.monotonic()
    assert process.send(signal.SIGTERM) == 143
    assert time.monotonic() - started < 5
    assert "SIGTERM: exiting at once; nothing has been trained yet." in process.text()


# This program loads Gemma repeatedly, so that the signal arrives during loading.
LOADING = """
import tiny
from gemma_scope_jax.models import weights

def forever(*args, load=weights._restore):
    print("Loading.", flush=True)
    while True:
        load(*args)

weights._restore = forever
tiny.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_gemma_loads_ends_the_run_at_once_with_one_line(inputs, tmp_path, number):
    c = tiny.run_config(inputs, **LONG)
    process = Process(c, tmp_path / "run", program=("-c", LOADING))
    process.wait_until(lambda: "Loading." in process.text())
    time.sleep(0.5)
    started = time.monotonic()
    assert process.send(number) == 128 + number
    assert time.monotonic() - started < 5
    told = process.text().split("Loading.")[1].split("\n")
    of_us = [line for line in told if line and "absl" not in line]
    assert of_us == [f"{number.name}: exiting at once; nothing has been trained yet."]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 420 kB, with room for one checkpoint but not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_reported_in_one_line_and_leaves_the_last_checkpoint(inputs, small_disk):
    c = tiny.run_config(inputs, train__tokens=128 * 100)
    process = Process(c, small_disk / "run", output=small_disk.with_suffix(".out"))
    assert process.popen.wait(timeout=120) == 1
    assert "Error: the disk is full; the last complete checkpoint is intact" in process.text()
    assert "Traceback" not in process.text()
    assert int(final_state(c, small_disk / "run").step) % 3 == 0
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    process = Process(c, small_disk / "run", output=small_disk.with_suffix(".out"))
    assert process.popen.wait(timeout=120) == 0, process.text()
    assert "Continuing from step" in process.text()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_soak_signals_at_random_moments_with_a_pipe(inputs, finished, tmp_path, seed):
    """Each signal ends the run soon, with or without a reader, and no finished step is lost."""
    moments, c, workdir = random.Random(seed), tiny.run_config(inputs, **LONG), tmp_path / "run"
    for _ in range(4):
        process = Process(c, workdir, is_piped=True)
        reader = threading.Thread(target=process.popen.stdout.read)
        if moments.random() < 0.7:
            process.popen.stdout.close()
        else:
            reader.start()
        before = len(logged_steps(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        if moments.random() < 0.7:
            after = min(before + moments.randrange(1, 60), 230)
            process.wait_until(lambda p=process, n=after: p.logged(n))
        time.sleep(6 * moments.random() ** 3)
        number = moments.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        for _ in range(moments.choice([1, 1, 2])):
            process.popen.send_signal(number)
        # A run that has just finished exits with 0.
        assert process.popen.wait(timeout=60) in (128 + number, -number, 0)
        if reader.ident:
            reader.join()
        process.popen.stdout.close()
        if (workdir / "metrics.jsonl").exists() and logged_steps(workdir):
            saved = max(
                (int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), default=0
            )
            assert saved in (logged_steps(workdir)[-1], before // 25 * 25, before)
    process = Process(c, workdir)
    assert process.popen.wait(timeout=300) == 0, process.text()
    assert_same_end(c, finished, workdir)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_soak_kills_at_random_moments(inputs, finished, tmp_path, seed):
    kill_and_resume(
        tiny.run_config(inputs, **LONG), finished, tmp_path / "run", kills=1 + seed % 3, seed=seed
    )


def test_held_out_l0_and_fvu_in_the_log_equal_numpy(inputs, tmp_path, tiny_gemma):
    mlp = dict(layers=(2,), sites=("mlp_in",), target_site="mlp_out")
    shared = dict(width=64, bandwidth=0.1, initial_threshold=0.1)
    banks = {"main": dict(layers=(1, 2), **shared), "mlp": mlp | shared}
    c = tiny.run_config(inputs, banks=banks, log__evaluate_every=7, mesh__data=2, mesh__latent=4)
    loop.train(c, tmp_path / "run")
    entries = log_lib.read_metrics(tmp_path / "run")
    assert [entry["step"] for entry in entries if "held_out" in entry] == [7, 14]
    found = entries[-1]["held_out"]
    assert "held out FVU" in log_lib.progress(entries[-1])

    run, state = runs.open_run(tmp_path / "run")
    rows = token_rows.open_rows(prepare.rows_of_run(c, tmp_path / "run"), token_rows.HELD_OUT)
    tokens = jnp.asarray(rows.read(token_rows.order(len(rows), c.seed, 0, 8)).tokens)
    kept = np.asarray(masking.is_kept(tokens, 0))
    for b in run.plan.banks:
        p = {
            k: np.asarray(v, np.float64) for k, v in vars(state.banks[b.name].params).items() if v is not None
        }
        for i, member in enumerate(b.members):
            sites = [member.site, member.target_site]
            values = forward.read_sites(tiny_gemma, tokens, sites)
            read, target = (state.normalizers[str(site)] for site in sites)
            x, y = (
                (np.asarray(values[site], np.float64)[kept] - np.float64(of.mean_D)) / float(read.scale)
                for site, of in zip(sites, (read, target), strict=True)
            )
            pre = (x if member.is_transcoder else x - p["b_dec"][i]) @ p["W_enc"][i] + p["b_enc"][i]
            f = pre * (pre > np.exp(p["log_threshold"][i]))
            error = f @ p["W_dec"][i] + p["b_dec"][i] - y
            np.testing.assert_allclose(found[member.name]["l0"], (f > 0).sum(1).mean(), rtol=1e-2)
            fvu = np.square(error).sum() / np.square(y - y.mean(0)).sum()
            np.testing.assert_allclose(found[member.name]["fvu"], fvu, rtol=1e-3)
