"""A run's SAEs are exported with the names and conventions of other tools."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_scope_jax.cli import evaluate as evaluate_cli
from gemma_scope_jax.evaluation import report
from gemma_scope_jax.models import forward
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import formats, jumprelu, loading, naming, saving
from gemma_scope_jax.saes.formats import common, gemma_scope_2
from gemma_scope_jax.training import export, loop, metrics_log, runs

MLP = dict(
    target_site="mlp_out", layers=(2,), width=64, bandwidth=0.1, initial_threshold=0.1, window_updates=12
)
BANKS = {
    "plain": MLP | dict(sites=("mlp_in_gain_free",), scale_target_by="target"),
    "skip": MLP | dict(sites=("mlp_in",), skip=True),
}


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    """A finished run with a plain and a skip transcoder."""
    folder = tmp_path_factory.mktemp("transcoders") / "run"
    loop.train(tiny.run_config(inputs, banks=BANKS, optimizer__learning_rate=0.01), folder)
    return folder


@pytest.fixture(scope="module")
def activations(inputs, tiny_gemma):
    """The MLP's inputs in layer 2, with and without gain, and its outputs."""
    tokens = jnp.asarray(tiny.tokens(8, 16))
    sites = {kind: Site(kind, 2) for kind in ("mlp_in", "mlp_in_gain_free", "mlp_out")}
    values = forward.read_sites(tiny_gemma, tokens, list(sites.values()))
    return {kind: np.asarray(values[site]).reshape(-1, 32) for kind, site in sites.items()}


def predict(transcoder, x):
    return np.asarray(jumprelu.decode(transcoder, jumprelu.encode(transcoder, x), x))


def training_form(workdir, name, activations):
    """The training state's predictions in float64, denormalised, and the tokens near a threshold."""
    run, state = runs.open_run(workdir)
    (plan,) = (b for b in run.plan.banks if b.name == name)
    member = plan.members[0]
    p = {
        key: np.asarray(v[0], np.float64)
        for key, v in vars(state.banks[name].params).items()
        if v is not None
    }
    read, target = (state.normalizers[str(site)] for site in (member.site, member.target_site))
    scale = float((target if plan.scale_target_by == "target" else read).scale)
    x = (activations[member.site.kind] - np.float64(read.mean_D)) / float(read.scale)
    pre = x @ p["W_enc"] + p["b_enc"]
    f = pre * (pre > np.exp(p["log_threshold"]))
    out = f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"] if member.skip else 0)
    return scale * out + np.float64(target.mean_D), np.abs(pre - np.exp(p["log_threshold"])).min(1) < 1e-4


@pytest.mark.parametrize(
    ("name", "file_format", "kind"),
    [
        ("plain", "gemma_scope", "mlp_in_gain_free"),
        ("plain", "gemma_scope_2", "mlp_in"),
        ("plain", "saelens", "mlp_in_gain_free"),
        ("skip", "gemma_scope_2", "mlp_in"),
        ("skip", "saelens", "mlp_in"),
        ("plain", "circuit_tracer", "mlp_in_gain_free"),
        ("skip", "circuit_tracer", "mlp_in"),
    ],
)
def test_a_transcoder_predicts_the_same_in_every_convention(
    workdir, activations, tmp_path, name, file_format, kind
):
    (path,) = export.export_run(workdir, (file_format,), tmp_path, name)
    (found,) = loading.read(path, "tiny", f"layer_2_{kind}", "layer_2_mlp_out")
    again = found.sae
    expected, is_near = training_form(workdir, name, activations)
    error = np.linalg.norm(predict(again, activations[kind]) - expected, axis=1)
    assert is_near.mean() < 0.2
    np.testing.assert_array_less(error[~is_near], 1e-4 * np.linalg.norm(expected, axis=1)[~is_near])
    # With the wrong gain, the predictions differ.
    other = {"mlp_in": "mlp_in_gain_free", "mlp_in_gain_free": "mlp_in"}[kind]
    wrong = np.linalg.norm(predict(again, activations[other]) - expected, axis=1)
    assert np.median(wrong / np.linalg.norm(expected, axis=1)) > 0.05


def test_a_gain_of_zero_is_refused_only_if_information_would_be_lost(workdir):
    run, state = runs.open_run(workdir)
    plain, skip = (
        export.as_stored(run, state, member, folded, 1.0, "")
        for member, (_, folded) in zip(run.plan.members, export.folded_saes(run.plan, state), strict=True)
    )
    gains = {2: jnp.ones(32).at[3].set(0)}
    with pytest.raises(ValueError, match="the norm before the MLP: 1 of the gain's values are zero"):
        saving.in_convention("gemma_scope_2", plain, gains)
    converted = saving.in_convention("gemma_scope", skip, gains).sae
    assert not converted.W_enc[3].any() and np.isfinite(converted.W_enc).all()


def test_an_impossible_export_fails_before_it_writes(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forward, "mlp_in_gain", lambda params, layer: jnp.zeros(32))
    with pytest.raises(ValueError, match="32 of the gain's values are zero"):
        export.export_run(workdir, ("gemma_scope_2",), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    # With several formats, the SAE is left out of the one that cannot hold it.
    paths = export.export_run(workdir, ("gemma_scope_2", "circuit_tracer"), tmp_path / "b")
    assert [path.relative_to(tmp_path / "b").parts[0] for path in paths] == [
        "circuit_tracer", "gemma_scope_2", "circuit_tracer",
    ]  # fmt: skip
    assert "Left out of gemma_scope_2: layer_2_mlp_in_gain_free_to_mlp_out" in capsys.readouterr().out


def test_obstacles_name_the_limits_of_each_format():
    residual, gain_free, mlp_in, mlp_out = (
        Site(kind, 2) for kind in ("resid_post", "mlp_in_gain_free", "mlp_in", "mlp_out")
    )
    for file_format, site, target, skip, dtype, message in (
        ("gemma_scope", mlp_in, mlp_out, True, "float32", "skip connection"),
        ("gemma_scope", residual, residual, False, "bfloat16", "NumPy's files have no type"),
        ("gemma_scope", residual, mlp_out, False, "float32", "is for transcoders that read mlp_in_gain_free"),
        ("gemma_scope_2", gain_free, gain_free, False, "float32", "Hugging Face has no name"),
        ("gemma_scope_2", mlp_in, gain_free, False, "float32", "Hugging Face has no name"),
        ("dictionary_learning", mlp_in, mlp_out, False, "float32", "is a transcoder"),
        ("circuit_tracer", residual, residual, False, "float32", "is not a transcoder"),
        (
            "circuit_tracer",
            mlp_in,
            Site("mlp_out", 3),
            False,
            "float32",
            "reads layer 2 and predicts layer 3",
        ),
    ):
        assert message in saving.obstacle(file_format, common.Kind(site, target, skip, dtype))
    for file_format in formats.written():
        if file_format != "circuit_tracer":
            assert saving.obstacle(file_format, common.Kind(residual, residual, False, "float32")) is None
        if file_format != "dictionary_learning":
            assert saving.obstacle(file_format, common.Kind(gain_free, mlp_out, False, "float32")) is None


def test_a_whole_run_is_exported_in_googles_layouts(inputs, workdir, tmp_path):
    paths = export.export_run(workdir, ("gemma_scope_2",), tmp_path / "2")
    l0 = export.measured_l0(*runs.open_run(workdir), workdir)
    plain, skip = (round(value) for value in l0.values())
    assert [str(path.relative_to(tmp_path / "2")) for path in paths] == [
        f"transcoder/layer_2_width_64_l0_{plain}",
        f"transcoder/layer_2_width_64_l0_{skip}_affine",
    ]
    _, about = gemma_scope_2.read(paths[0])
    assert about.hook_name == "model.layers.2.pre_feedforward_layernorm.output"
    assert about.hook_name_out == "model.layers.2.post_feedforward_layernorm.output"
    np.testing.assert_allclose(about.l0, next(iter(l0.values())), atol=0.01)
    with pytest.raises(ValueError, match=r"_skip_width_64_.* has a skip connection, which .* cannot hold"):
        export.export_run(workdir, ("gemma_scope",), tmp_path / "1")
    assert not (tmp_path / "1").exists()
    (path,) = export.export_run(workdir, ("gemma_scope",), tmp_path / "1", "plain")
    assert (
        path == tmp_path / "1" / "transcoder" / "layer_2" / "width_64" / f"average_l0_{plain}" / "params.npz"
    )
    with pytest.raises(ValueError, match="has no bank 'none'; choose one of plain, skip"):
        export.export_run(workdir, ("gemma_scope",), tmp_path / "1", "none")
    with pytest.raises(ValueError, match=f"l0_{plain} already exists; remove it, or give another --out"):
        export.export_run(workdir, ("gemma_scope_2",), tmp_path / "2")


def test_the_l0_in_a_name_comes_from_held_out_rows_or_the_last_updates(workdir, tmp_path):
    run, state = runs.open_run(workdir)
    step = int(state.step)
    logged = {name: v["l0"] for name, v in metrics_log.read_metrics(workdir)[-1]["sae"].items()}
    assert export.measured_l0(run, state, workdir) == pytest.approx(logged)
    since = export.measured_l0(run, state, tmp_path)  # There is no log in this folder.
    for plan in run.plan.banks:
        # Three windows of twelve updates, and a step of four more, which is the last line of the log.
        assert int(state.banks[plan.name].updates_E[0]) == 40
        np.testing.assert_allclose(since[plan.members[0].name], logged[plan.members[0].name], rtol=0.02)
    config = run.config
    about = {
        "model": config.model, "dtype": config.gemma_dtype, "text": config.data.text, "split": "held_out",
        "turns": None, "context_length": 16, "weights": config.weights, "tokenizer": "", "step": step,
    }  # fmt: skip
    measured = {name: 11.0 + i for i, name in enumerate(logged)}
    shutil.copy(workdir / "metrics.jsonl", tmp_path)
    logged = export.measured_l0(run, state, tmp_path)
    for differs, expected in (
        ({}, measured),
        ({"step": step - 1}, logged),
        ({"text": "news"}, logged),
        ({"split": "train"}, logged),
    ):
        sae = {name: {"l0": value} for name, value in measured.items()}
        (tmp_path / "evaluation.json").write_text(json.dumps(about | differs | {"sae": sae}))
        assert export.measured_l0(run, state, tmp_path) == expected
    (tmp_path / "evaluation.json").write_text('{"sae": [1]}')
    assert export.measured_l0(run, state, tmp_path) == logged  # A damaged evaluation is ignored.


def test_folder_names_follow_googles_and_are_unique():
    def member(kind="resid_post", coefficient=1e-3, seed=0, skip=False, target=None, layer=9):
        site = Site(kind, layer)
        return naming.Member(
            site, Site(target, layer) if target else site, 2**14, coefficient, seed, skip=skip
        )

    members = {
        "a": member(),
        "b": member(coefficient=2e-3),
        "c": member(seed=1),
        "d": member("embed", layer=0),
        "e": member("mlp_in", target="mlp_out"),
        "f": member("mlp_in_gain_free", target="mlp_out"),
        "g": member("mlp_in", target="mlp_out", skip=True),
    }
    l0 = dict.fromkeys(members, 57.4)
    places = {name: str(place) for name, place in export.layout(members, l0, "gemma_scope").items()}
    assert places["a"] == "resid_post/layer_9/width_16k/average_l0_57"
    assert places["b"] == "resid_post/layer_9/width_16k/average_l0_57_lambda_0.002"
    assert places["c"] == "resid_post/layer_9/width_16k/average_l0_57_seed_1"
    assert places["d"] == "embed/embedding/width_16k/average_l0_57"
    assert places["e"] == "transcoder/layer_9/width_16k/average_l0_57"
    second = {name: str(place) for name, place in export.layout(members, l0, "gemma_scope_2").items()}
    assert second["a"] == "resid_post/layer_9_width_16k_l0_57"
    assert second["g"] == "transcoder/layer_9_width_16k_l0_57_affine"
    for made in (places, second):
        assert len(set(made.values())) == len(members)


def test_a_transcoder_evaluates_the_same_from_its_run_and_its_export(workdir, monkeypatch, inputs, capsys):
    from_run = evaluate_cli.evaluate_path(workdir, rows=8)
    monkeypatch.setenv("HOME", str(inputs / "home"))
    for name, result in from_run.items():
        exported = evaluate_cli.evaluate_path(workdir / "sae" / name, rows=8)[name]
        for key in ("l0", "fvu", "delta_loss", "mean_ablation_loss"):
            np.testing.assert_allclose(getattr(exported, key), getattr(result, key), rtol=1e-3, atol=1e-4)


def test_sweeps_are_ordered_by_lambda_and_not_by_results():
    site = Site("resid_post", 9)
    members = [naming.Member(site, site, 2**14, coefficient) for coefficient in (4e-3, 1e-3, 2e-3)]
    members += [
        naming.Member(site, site, 2**14, 1e-3, objective="controlled", target_l0=target)
        for target in (50.0, 20.0)
    ]
    members += [naming.Member(Site("mlp_out", 9), Site("mlp_out", 9), 2**14, 1e-3)]
    found = report.sweeps({member.name: member for member in members})
    (points,) = (list(p.values()) for label, p in found.items() if "controlled" not in label)
    assert points == ["λ 0.001", "λ 0.002", "λ 0.004"]
    (points,) = (list(p.values()) for label, p in found.items() if "controlled" in label)
    assert points == ["L0* 20", "L0* 50"]


def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(workdir, tmp_path, monkeypatch):
    written, write = [], saving.write

    def cut_off_at_the_second(*args):
        written.append(write(*args))
        if len(written) == 2:
            raise KeyboardInterrupt
        return written[-1]

    for out in (tmp_path / "new", tmp_path / "mine"):
        written.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(saving, "write", cut_off_at_the_second)
            export.export_run(workdir, ("saelens",), out)
        assert len(written) == 2 and not out.exists()
        if out.name == "mine":
            out.mkdir()
            (out / "notes.txt").touch()
        places = export.export_run(workdir, ("saelens",), out)
        assert [len(list(loading.read(place))) for place in places] == [1, 1]
        with pytest.raises(ValueError, match="already exists; remove it, or give another --out"):
            export.export_run(workdir, ("saelens",), out)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "transcoder", "transcoder_skip"]
    assert not [path for path in tmp_path.rglob(".*")]
    # Other files beside a run's own SAEs are kept when the SAEs are written again.
    own = workdir / "sae" / "layer_2_mlp_in_to_mlp_out_skip_width_64_lambda_0.0006"
    (own / "evaluation.json").touch()
    run, state = runs.open_run(workdir)
    export.write_own(run, state, workdir / "sae", "rows")
    assert (own / "evaluation.json").exists() and len(list(loading.read(own))) == 1


def test_saes_with_similar_names_are_converted_into_separate_folders(workdir, tmp_path):
    (first, _) = sorted((workdir / "sae").iterdir())
    for name in ("a b", "a_b", "A b"):
        shutil.copytree(first, tmp_path / "saes" / name)
    places = saving.convert(f"{tmp_path}/saes/*", "saelens", tmp_path / "out", model="tiny")
    assert len({place.name.lower() for place in places}) == 3 and all(
        p.parent == tmp_path / "out" for p in places
    )
    for name in ("a b", "a_b", "A b"):
        (tmp_path / "saes" / f"in {name}").mkdir()
        (tmp_path / "saes" / name).rename(tmp_path / "saes" / f"in {name}" / "same")
    alike = [one.name for one in loading.read(f"{tmp_path}/saes/*/same", "tiny")]
    assert alike == ["same", "in a b_same", "in a_b_same"]
    shutil.rmtree(tmp_path / "saes")
    (tmp_path / "saes").mkdir()
    (found,) = saving.convert(first, "gemma_scope", tmp_path / "npz", model="tiny")
    for name in ("...npz", ".. .npz"):
        shutil.copy(found, tmp_path / "saes" / name)
    sites = {"model": "tiny", "site": "layer_2_mlp_in_gain_free", "target_site": "layer_2_mlp_out"}
    places = saving.convert(f"{tmp_path}/saes/.*npz", "saelens", tmp_path / "held", **sites)
    assert len(set(places)) == 2 and all(place.parent == tmp_path / "held" for place in places)
