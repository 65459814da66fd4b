"""Runs the code of docs/extending.md, and uses its additions from training to export."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny

from gemma_scope_jax.cli import evaluate as evaluate_cli
from gemma_scope_jax.evaluation import metrics
from gemma_scope_jax.models import interventions, registry
from gemma_scope_jax.saes import evaluation_file, formats, jumprelu, loading, objectives
from gemma_scope_jax.training import export, loop

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines; the registries are restored afterwards."""
    tables = (objectives.OBJECTIVES, metrics.METRICS, formats.FORMATS, registry.MODELS)
    before = [dict(table) for table in tables]
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5 and all(len(block.splitlines()) < 30 for block in blocks)
    try:
        exec("\n".join(blocks), names)
        yield types.SimpleNamespace(**names)
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


@pytest.fixture(scope="module")
def workdir(page, inputs, tmp_path_factory):
    """A run with the page's objective, evaluated with its metric."""
    folder = tmp_path_factory.mktemp("extended") / "run"
    options = {"extra": 20.0}
    bank = {"banks__main__objective": "frequent", "banks__main__objective_options": options}
    loop.train(tiny.run_config(inputs, banks__main__layers=(1,), **bank), folder)
    evaluate_cli.evaluate_path(folder, rows=4, rows_per_batch=4)
    return folder


def test_the_objective_trains_and_its_penalty_equals_numpy(page, workdir):
    (name,) = [path.name for path in (workdir / "sae").iterdir()]
    assert name.endswith("_frequent_extra_20.0")
    frequency_M = np.random.default_rng(0).random(64).astype(np.float32)
    penalty = page.frequent_penalty(0.5, 0.0, {"extra": 3.0})
    found = penalty(objectives.Sparsity(frequency_M.sum(), frequency_M))
    np.testing.assert_allclose(found, 0.5 * (frequency_M + 3 * frequency_M**2).sum(), rtol=1e-5)


def test_the_metric_appears_in_files_pages_and_comparisons(workdir, tmp_path):
    (of,) = evaluation_file.read_numbers(workdir / "evaluation.json")["sae"].values()
    assert 0 < of["strongest_share"] < 1 and of["strongest_share_se"] > 0
    assert "strongest share" in (workdir / "evaluation.html").read_text()
    assert "strongest_share" in (workdir / "evaluation.csv").read_text().splitlines()[0]
    with np.load(workdir / "evaluation.npz") as arrays:
        (key,) = [key for key in arrays if key.endswith("by_row/strongest_share")]
        count_S = arrays[key.replace("strongest_share", "activations")]
        np.testing.assert_allclose(of["strongest_share"], arrays[key].sum() / count_S.sum(), rtol=1e-6)
    assert metrics.paired()["strongest_share"] == ("strongest_share", None, "activations")


def test_the_metric_equals_numpy(page):
    f_BxM = np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(page.strongest_share(types.SimpleNamespace(f_BxM=f_BxM)), [0.75, 0])


def test_the_format_is_written_and_read(workdir, tmp_path):
    (path,) = export.export_run(workdir, ("lists",), tmp_path / "out")
    (found,) = loading.read(path)
    (own,) = loading.read(f"{workdir}/sae/*")
    assert formats.format_of(path) == "lists" and found.site == own.site
    np.testing.assert_array_equal(found.sae.W_enc, own.sae.W_enc)
    assert json.loads((path / "lists.json").read_text())["model"] == "test/tiny"


def test_the_model_is_found_by_its_names(page):
    assert registry.build_model("gemma3_270m_shallow").config.num_layers == 6
    assert registry.name_from_hugging_face("someone/gemma-3-270m-shallow") == "gemma3_270m_shallow"
    with pytest.raises(ValueError, match=r"gemma3_270m_shallow has no default weights"):
        registry.weights_path("gemma3_270m_shallow", "")


def test_capping_a_latent_limits_it_and_changes_no_other(page):
    rng = np.random.default_rng(0)
    # Orthogonal latents, so that changing one does not change another.
    eye = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    sae = jumprelu.SAE(
        eye.T, np.zeros(8, np.float32), np.full(8, 0.1, np.float32), eye, np.zeros(4, np.float32)
    )
    x_SxLxD = rng.normal(size=(2, 5, 4)).astype(np.float32)
    positions_SxL = np.tile(np.arange(5), (2, 1))
    where = interventions.Where(positions_SxL + 9, positions_SxL, positions_SxL >= 0, {})
    found = np.asarray(page.capped(sae, 1, 0.25)(x_SxLxD, where))
    expected = x_SxLxD.copy()
    expected[:, 1:, 1] = np.minimum(expected[:, 1:, 1], 0.25)
    assert (expected != x_SxLxD).any()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_registering_again_replaces_the_former_entry(page):
    """This happens when a process reads a config file twice, or a notebook's cell runs again."""
    again = dataclasses.replace(objectives.OBJECTIVES["frequent"])
    objectives.register("frequent", again)
    assert objectives.OBJECTIVES["frequent"] is again
    other = metrics.Metric("another", "x", measure=len)
    kept = metrics.METRICS["strongest_share"]
    metrics.register("strongest_share", other)
    assert metrics.METRICS["strongest_share"] is other
    metrics.register("strongest_share", kept)


def test_an_evaluation_does_not_resume_with_the_results_of_a_changed_metric(page):
    """The definitions, which identify stored results, change with a metric's code but not when it is read again."""
    kept, before = metrics.METRICS["strongest_share"], metrics.definitions()
    again = types.FunctionType(kept.measure.__code__.replace(), {})
    metrics.register("strongest_share", dataclasses.replace(kept, measure=again))
    assert metrics.definitions() == before
    metrics.register("strongest_share", dataclasses.replace(kept, measure=lambda f_M: f_M.max()))
    assert metrics.definitions() != before
    metrics.register("strongest_share", kept)


def test_the_digest_of_a_metrics_code_is_the_same_in_every_process():
    """The code contains a set of strings, whose order differs between processes."""
    code = (
        "from gemma_scope_jax.evaluation import metrics\n"
        "print(metrics._digest((lambda name: name in {'a', 'b', 'c', 'd', 'e'}).__code__))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", ["count", "error", "explained", "loss", "variance", "activations"])
def test_a_metric_cannot_have_the_name_of_a_built_in_sum(name):
    with pytest.raises(ValueError, match=f"the metric name '{name}' is taken"):
        metrics.register(name, metrics.Metric("x", "y", measure=len))


def test_taken_names_and_incomplete_metrics_are_refused():
    with pytest.raises(ValueError, match="the metric name 'fvu' is taken"):
        metrics.register("fvu", metrics.Metric("x", "y", measure=len))
    with pytest.raises(ValueError, match="has neither measure nor reduce"):
        metrics.register("nothing", metrics.Metric("x", "y"))
    with pytest.raises(ValueError, match="another format is called 'saelens'"):
        formats.register("saelens", formats.FORMATS["gemma_scope"])
    with pytest.raises(ValueError, match=r"params.npz is also a mark of the format 'gemma_scope'"):
        formats.register("other", formats.Format(("params.npz",), list))
    with pytest.raises(ValueError, match="another model is called 'gemma2_2b'"):
        registry.register("gemma2_2b", registry.spec("gemma2_9b"))
