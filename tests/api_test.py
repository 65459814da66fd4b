"""The public API, `import gemma_scope_jax as gs`: its calls are silent by default and return values."""

import dataclasses
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tiny

import gemma_scope_jax as gs
from gemma_scope_jax import analysis
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.sites import Site

pytestmark = pytest.mark.silent
TEXT = "bread and song"


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A finished run of two SAEs."""
    config = tiny.run_config(inputs, banks__main__sparsity_coefficients=(1e-3, 1e-1))
    return gs.train(config, tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def model(inputs):
    return gs.load_model("tiny", weights=str(inputs / "weights"), dtype="float32")


def test_a_trained_run_has_its_saes_its_log_and_its_config(run):
    assert len(run.saes) == 2 and run.config.model == "tiny"
    with pytest.raises(ValueError, match="has several SAEs; choose one of"):
        _ = run.sae
    log = run.metrics
    assert isinstance(log, pd.DataFrame) and {"step", "sae", "l0", "fvu"} <= set(log)
    assert set(log.sae) == set(run.saes)
    for name, one in gs.load_saes(run.path).items():
        np.testing.assert_array_equal(one.sae.W_enc, run.saes[name].sae.W_enc)


def test_config_fields_are_set_by_name(inputs, tmp_path):
    config = tiny.run_config(inputs)
    run = gs.train(config, tmp_path / "a", width=128, banks__main__bandwidth=0.2)
    assert run.sae.sae.b_enc.size == 128 and run.config.banks["main"].bandwidth == 0.2
    with pytest.raises(ValueError, match=r"no field 'widht'; did you mean banks.main.width\?"):
        gs.train(config, tmp_path / "b", widht=128)
    with pytest.raises(
        ValueError, match=r"several fields are called 'rows': normalizer.rows, evaluation.rows"
    ):
        gs.train(config, tmp_path / "b", rows=3)
    with pytest.raises(ValueError, match=r"no config file 'quikstart'; did you mean 'quickstart'\?"):
        gs.train("quikstart", tmp_path / "b")


def test_an_sae_encodes_and_decodes_activations_of_any_shape(run, model):
    one = next(iter(run.saes.values()))
    x_LxD = model.activations(TEXT, one.site)
    assert x_LxD.shape == (len(TEXT), 32) and model.words(TEXT) == list(TEXT)
    f_LxM = one.encode(x_LxD)
    pre = np.float64(x_LxD) @ np.float64(one.sae.W_enc) + one.sae.b_enc
    want = np.where(pre > one.sae.threshold, np.maximum(pre, 0), 0)
    np.testing.assert_allclose(f_LxM, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        one(x_LxD), want @ np.float64(one.sae.W_dec) + one.sae.b_dec, rtol=1e-3, atol=1e-3
    )
    # A matrix product with one row may add its terms in another order than a product with many rows.
    np.testing.assert_allclose(one.encode(x_LxD[2]), f_LxM[2], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(one.encode(x_LxD.reshape(2, -1, 32)).reshape(f_LxM.shape), f_LxM)


def test_activations_equal_those_of_read_sites_without_bos(model):
    site = Site("mlp_out", 2)
    tokens = jnp.asarray([[masking.BOS, *tiny.encode(TEXT)]])
    want = forward.read_sites(model.gemma, tokens, [site])[site][0, 1:]
    np.testing.assert_allclose(model.activations(TEXT, "layer_2_mlp_out"), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.activations(tokens[0].tolist(), site), model.activations(TEXT, site))
    with pytest.raises(ValueError, match="the text is empty"):
        model.activations("", site)


def test_a_model_loads_only_the_blocks_that_an_sae_needs(run, inputs):
    one = next(iter(run.saes.values()))
    part = gs.load_model(one, weights=str(inputs / "weights"), dtype="float32")
    assert part.gemma.num_layers == 2
    assert part.activations(TEXT, one.site).shape == (len(TEXT), 32)
    with pytest.raises(ValueError, match="layer_3_resid_post is after the 2 loaded blocks of tiny"):
        part.activations(TEXT, "layer_3_resid_post")
    with pytest.raises(ValueError, match="only 2 of tiny's 4 blocks are loaded"):
        gs.evaluate(run, part)


def test_an_evaluation_is_the_same_from_a_run_a_path_and_loaded_saes(run, model, tmp_path, capsys):
    options = {"rows": 4, "rows_per_batch": 4, "fast": True}
    results = gs.evaluate(run, **options)
    table = results.to_dataframe()
    assert (
        set(table.index) == set(run.saes) and (table.l0 > 0).all() and set(results.verdicts) == set(run.saes)
    )
    for other in (gs.evaluate(run.path, model, **options), gs.evaluate(run.saes, **options)):
        again = other.to_dataframe().loc[table.index]
        np.testing.assert_allclose(
            again[["l0", "fvu", "delta_loss"]], table[["l0", "fvu", "delta_loss"]], rtol=1e-5
        )
    (one,) = gs.evaluate(next(iter(run.saes.values())), model, **options).results
    assert one == next(iter(run.saes))
    assert capsys.readouterr() == ("", "")
    results.show()
    assert "L0" in capsys.readouterr().out
    names = {path.name for path in results.save(tmp_path / "new")}
    assert names == {f"evaluation.{kind}" for kind in ("json", "npz", "csv", "png", "html")} | {"pareto.png"}
    assert results.figure().axes


def test_a_session_reads_the_latents_of_a_text(run, model):
    scope = gs.session(run, model)
    found = analysis.read(scope, TEXT)
    assert found.tokens == tuple(TEXT) and set(found.latents) == set(run.saes)


def test_error_messages_say_how_to_fix_the_call(run, model, tmp_path):
    with pytest.raises(ValueError, match=r"has 2 SAEs, .*; load them with load_saes"):
        gs.load_sae(run.path)
    with pytest.raises(ValueError, match="no SAEs are given; give SAEs"):
        gs.evaluate({}, model)
    with pytest.raises(ValueError, match="unknown model 'tinny'"):
        gs.load_model("tinny")


def test_invalid_arguments_are_refused(run, model):
    one = next(iter(run.saes.values()))
    for x in (np.zeros((3, 5)), np.float32(0)):
        with pytest.raises(ValueError, match=r"reads activations of width 32; these have shape \("):
            one.encode(x)
    with pytest.raises(ValueError, match=r"has 64 latents; these have shape \(2, 3\)"):
        one.decode(np.zeros((2, 3)))
    assert one.encode(np.zeros((0, 32))).shape == (0, 64)
    for text in ([], ["one", "two"], [2]):
        with pytest.raises(ValueError, match="the text must be one string, or token ids"):
            model.activations(text, one.site)
    with pytest.raises(ValueError, match="unknown turns 'everyone'; choose all, user or model"):
        gs.evaluate(run, model, turns="everyone")
    with pytest.raises(ValueError, match="have no split 'test'; choose held_out or train"):
        gs.evaluate(run, model, split="test")
    with pytest.raises(ValueError, match="3 is not an SAE; give SAEs"):
        gs.evaluate(3, model)


def test_reprs_are_short(run, model):
    one = next(iter(run.saes.values()))
    results = gs.evaluate(run, model, rows=4, rows_per_batch=4, fast=True)
    assert repr(one) == f"LoadedSAE({one.name!r}, tiny, layer_1_resid_post, 64 latents)"
    assert repr(model.gemma) == "Gemma(tiny, 4 of 4 blocks, float32, on 1 device)"
    assert max(len(repr(shown)) for shown in (one, model, results)) < 300
    assert one == one and one != next(reversed(run.saes.values())) and len({one, results}) == 2


def test_a_session_keeps_the_names_of_a_dict_of_saes(run, model):
    one = next(iter(run.saes.values()))
    assert set(gs.session({"x": one, "y": one}, model).subjects) == {"x", "y"}
    with pytest.raises(
        ValueError, match=r"has two SAEs with the same name; .* or give a dict of SAEs by name"
    ):
        gs.session([one, one], model)


def test_an_sae_loads_the_model_of_its_run(run, inputs):
    part = gs.load_model(next(iter(run.saes.values())))  # The name alone has no default weights.
    assert (part.gemma.num_layers, part.gemma.dtype) == (2, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_session_and_a_loaded_model_use_the_dtype_that_an_sae_file_names(run, inputs, dtype):
    one = next(iter(run.saes.values()))
    file = dataclasses.replace(one, about=dataclasses.replace(one.about, gemma_dtype=dtype), is_of_run=False)
    assert gs.load_model(file, weights=str(inputs / "weights")).gemma.dtype == jnp.dtype(dtype)
    assert gs.session([file], trust=True).gemma.dtype == jnp.dtype(dtype)


def test_an_unfinished_run_has_the_saes_of_its_newest_checkpoint(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run.path, workdir)
    shutil.rmtree(workdir / "sae")
    found = gs.load_saes(workdir)
    assert set(found) == set(run.saes)
    for name, one in found.items():
        np.testing.assert_array_equal(one.sae.W_enc, run.saes[name].sae.W_enc)


def test_calls_print_nothing_write_nothing_and_keep_signal_handlers(inputs, tmp_path, monkeypatch, capfd):
    """The messages go to the logger instead."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    logger, records = logging.getLogger("gemma_scope_jax"), []
    heard = logging.Handler()
    heard.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    try:
        run = gs.train(tiny.run_config(inputs), tmp_path / "run")
        before = sorted(tmp_path.rglob("*"))
        results = gs.evaluate(run, rows=4, rows_per_batch=4, fast=True)
        sae, gemma = run.sae, gs.load_model("tiny", weights=str(inputs / "weights"), dtype="float32")
        sae(gemma.activations(TEXT, sae.site))
        analysis.read(gs.session(run, gemma), TEXT)
        results.to_dataframe()
    finally:
        logger.removeHandler(heard)
        logger.setLevel(logging.NOTSET)
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == before
    assert handlers == {number: signal.getsignal(number) for number in handlers}
    assert any(text.startswith("Exported") for text in records) and "Compiling the training step …" in records


def test_progress_bars_are_shown_on_request(run, capfd):
    gs.evaluate(run, rows=4, rows_per_batch=4, fast=True, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "Evaluating" in err


def test_importing_the_package_takes_under_half_a_second_and_imports_nothing_heavy():
    code = (
        "import time; start = time.process_time(); import gemma_scope_jax as gs; dir(gs);"
        "took = time.process_time() - start; import sys;"
        "print(took, any(name in sys.modules for name in ('jax', 'numpy', 'gemma', 'tensorflow')))"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    took, is_heavy = done.stdout.split()
    assert float(took) < 0.5 and is_heavy == "False"
