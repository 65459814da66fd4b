"""SAEs are loaded with their model, site and units, and files of strangers are not trusted."""

import dataclasses

import numpy as np
import pytest

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import sources, token_rows
from gemma_scope_jax.evaluation import opening
from gemma_scope_jax.models import placement, registry
from gemma_scope_jax.models.sites import SITES, Site, site_from_hook
from gemma_scope_jax.saes import finding, jumprelu, loading, saving
from gemma_scope_jax.saes.formats import common, gemma_scope, saelens


def made(site, target_site=None, d=32, o=32):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (d, 64), "b_enc": (64,), "threshold": (64,), "W_dec": (64, o), "b_dec": (o,)}
    folded = jumprelu.SAE(**{name: rng.random(shape, np.float32) for name, shape in shapes.items()})
    return loading.LoadedSAE("x", folded, common.About(), "tiny", site, target_site or site)


def test_a_model_and_site_must_be_given_if_the_file_lacks_them(tmp_path):
    one = made(Site("resid_post", 2))
    gemma_scope.write(tmp_path, one.sae, common.About())
    with pytest.raises(ValueError, match="does not name its model and site; give them, for example"):
        list(loading.read(tmp_path / "params.npz"))
    (found,) = loading.read(tmp_path / "params.npz", "tiny", "layer_2_resid_post")
    assert (found.site, found.target_site) == (Site("resid_post", 2),) * 2
    (found,) = loading.read(tmp_path, "tiny", "layer_2_mlp_in_gain_free", "layer_2_mlp_out")
    assert found.target_site == Site("mlp_out", 2)
    for site, message in (
        ("layer_7_resid_post", "layer 7 is out of range"),
        ("layer_2_attn_out", "reads activations of width 32, but layer_2_attn_out of tiny has width 64"),
        ("resid", "unknown site 'resid'; give a name such as layer_9_resid_post"),
    ):
        with pytest.raises(ValueError, match=message):
            list(loading.read(tmp_path / "params.npz", "tiny", site))


def test_sites_are_found_by_all_their_names():
    for kind, names in SITES.items():
        layer = 0 if kind == "embed" else 5
        site = Site(kind, layer)
        for name in (str(site), *(name.format(layer) for name in names if name)):
            assert site_from_hook(name) == site
    assert registry.name_from_hugging_face("gemma-2-9b-it") == "gemma2_9b-it"


def test_gemma_scopes_embedding_saes_are_rescaled_by_the_root_of_d(tmp_path):
    one = made(Site("embed", 0))
    saving.write(tmp_path / "a", "gemma_scope", saving.in_convention("gemma_scope", one, {}))
    theirs, _ = gemma_scope.read(tmp_path / "a" / "params.npz")
    (again,) = loading.read(tmp_path / "a", "tiny", "embed")
    stream = np.random.default_rng(1).standard_normal((50, 32)).astype(np.float32)
    want = jumprelu.decode(one.sae, jumprelu.encode(one.sae, stream))
    np.testing.assert_allclose(
        jumprelu.decode(again.sae, jumprelu.encode(again.sae, stream)), want, rtol=1e-5
    )
    of_embedding = jumprelu.decode(theirs, jumprelu.encode(theirs, stream / 32**0.5))
    np.testing.assert_allclose(of_embedding, np.asarray(want) / 32**0.5, rtol=1e-5)
    # SAELens' folders use the units of the stream, like TransformerLens' hook.
    saving.write(tmp_path / "b", "saelens", saving.in_convention("saelens", one, {}))
    np.testing.assert_array_equal(saelens.read(tmp_path / "b")[0].b_enc, one.sae.b_enc)


@pytest.mark.parametrize("file_format", ["saelens", "gemma_scope", "gemma_scope_2", "dictionary_learning"])
def test_an_sae_opens_the_same_from_every_format(file_format, inputs, tmp_path, monkeypatch):
    one = made(Site("resid_post", 1))
    one = dataclasses.replace(one, about=dataclasses.replace(one.about, context_length=16))
    saving.write(tmp_path / "a", file_format, one)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    site = {} if file_format != "gemma_scope" else {"model": "tiny", "site": "layer_1_resid_post"}
    opened = opening.open_path(
        tmp_path / "a", text=str(inputs / "text.jsonl"), weights=str(inputs / "weights"), **site
    )
    (subject,) = opened.subjects.values()
    np.testing.assert_array_equal(subject.sae.W_enc, one.sae.W_enc)
    assert (subject.site, opened.config.model) == (one.site, "tiny")
    assert opened.config.data.context_length == (
        16 if file_format in ("saelens", "dictionary_learning") else 1024
    )


def named(tmp_path, place, text, weights="gs://nowhere/weights", tokenizer="http://nowhere/tokenizer.json"):
    """Writes an SAE in a SAELens folder whose config names its text, weights and tokenizer."""
    one = made(Site("resid_post", 1))
    about = common.About(
        text=str(text), weights=weights, tokenizer=tokenizer, rows="rows_0123456789abcdef", context_length=16,
        held_out_fraction=0.25, data_seed=7,
    )  # fmt: skip
    return saving.write(tmp_path / place, "saelens", dataclasses.replace(one, about=about))


def run_folder(folder):
    """Makes a folder look like a run directory."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def places(opened):
    config = opened.config
    return config.data.text, config.weights, config.tokenizer


def test_paths_named_by_a_strangers_file_are_shown_but_not_opened(tmp_path, monkeypatch, capsys):
    path = named(tmp_path, "a", "/**/*.txt")
    looked_for = []
    monkeypatch.setattr(sources, "files_of", lambda text: looked_for.append(text) or set())
    monkeypatch.setattr(token_rows, "cached", lambda *_: pytest.fail("its rows are opened"))
    opened = opening.open_path(path)
    assert places(opened) == (config_lib.DEFAULT_TEXT, "", "")
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "file names" in line)
    assert said == (
        "The file names text /**/*.txt, weights gs://nowhere/weights, tokenizer http://nowhere/tokenizer.json. "
        "They are not used unless you give --trust, or each by its own flag."
    )
    assert opened.config.data.held_out_fraction == config_lib.DataConfig().held_out_fraction
    # All of another text is held out, and the named text is not looked up.
    opened = opening.open_path(
        path, text=str(tmp_path / "mine.txt"), weights="gs://mine", tokenizer="gs://mine/t"
    )
    assert places(opened) == (str(tmp_path / "mine.txt"), "gs://mine", "gs://mine/t")
    assert opened.config.data.held_out_fraction == 1
    assert "file names" not in capsys.readouterr().out
    assert looked_for and "/**/*.txt" not in looked_for


def test_paths_named_by_a_file_are_used_on_request(inputs, tmp_path, capsys):
    path = named(tmp_path, "a", inputs / "text.jsonl", str(inputs / "weights"), "")
    opened = opening.open_path(path, trust=True)
    assert places(opened) == (str(inputs / "text.jsonl"), str(inputs / "weights"), "")
    assert opened.config.data.held_out_fraction == 0.25 and opened.config.data.seed == 7
    assert "They are not used" not in capsys.readouterr().out
    # If the user gives the same text, it is split as in training.
    opened = opening.open_path(path, text=str(inputs / "text.jsonl"))
    assert places(opened) == (str(inputs / "text.jsonl"), "", "")
    assert opened.config.data.held_out_fraction == 0.25 and opened.config.data.seed == 7
    assert f"The file names weights {inputs / 'weights'}. They are not used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nowhere does not exist here; give another --weights"):
        opening.open_path(named(tmp_path, "b", "", weights="nowhere"), trust=True)


def test_an_sae_of_a_run_directory_opens_with_the_runs_paths(inputs, tmp_path):
    run = run_folder(tmp_path / "run")
    arguments = inputs / "text.jsonl", str(inputs / "weights"), ""
    named(run / "sae", "x", *arguments)
    (tmp_path / "latest").symlink_to(run)
    for location in (run / "sae" / "x", tmp_path / "latest" / "sae" / "x" / "cfg.json", f"{run}/sae/*"):
        assert places(opening.open_path(location)) == tuple(map(str, arguments)), location
    # SAEs elsewhere in the run directory, or behind a link, do not count as the run's.
    named(run, "downloads/x", *arguments)
    named(tmp_path, "elsewhere/y", *arguments)
    (run / "sae" / "y").symlink_to(tmp_path / "elsewhere" / "y")
    for location in (run / "downloads" / "x", run / "sae" / "y"):
        assert places(opening.open_path(location)) == (config_lib.DEFAULT_TEXT, "", ""), location


def test_a_folder_from_the_hub_is_never_a_run_directory(inputs, tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")
    named(run / "sae", "x", inputs / "text.jsonl", str(inputs / "weights"), "")
    monkeypatch.setattr(finding, "local", lambda location: tmp_path / location.removeprefix("hf://a/b/"))
    assert places(opening.open_path("hf://a/b/run/sae/x")) == (config_lib.DEFAULT_TEXT, "", "")
    with pytest.raises(ValueError, match="run is a run directory, not an SAE; export writes its SAEs"):
        opening.open_path("hf://a/b/run")


def test_converting_ignores_weights_named_only_by_the_file(tmp_path, monkeypatch, capsys):
    one = made(Site("mlp_in", 1), Site("mlp_out", 1))
    one = dataclasses.replace(one, about=common.About(weights="gs://nowhere"))
    saving.write(tmp_path / "a", "saelens", one)
    asked = []
    monkeypatch.setattr(placement, "load", lambda name, weights, *_, **__: asked.append(weights) or 1 / 0)
    for weights in ("", "gs://mine"):
        with pytest.raises(ZeroDivisionError):
            saving.convert(str(tmp_path / "a"), "gemma_scope", tmp_path / "b", weights=weights)
    assert asked == ["", "gs://mine"]
    assert "The file names weights gs://nowhere. They are not used unless you give" in capsys.readouterr().out


def test_converting_writes_the_same_sae_in_another_format(tmp_path, capsys):
    one = made(Site("resid_post", 1))
    saving.write(tmp_path / "a", "gemma_scope", one)
    site = {"model": "tiny", "site": "layer_1_resid_post"}
    (path,) = saving.convert(str(tmp_path / "a"), "saelens", tmp_path / "b", **site)
    again, about = saelens.read(path)
    np.testing.assert_array_equal(again.W_dec, one.sae.W_dec)
    assert (about.model_name, about.hook_name) == ("test/tiny", "blocks.1.hook_resid_post")
    with pytest.raises(ValueError, match="is not a transcoder, and circuit-tracer reads only transcoders"):
        saving.convert(str(tmp_path / "b"), "circuit_tracer", tmp_path / "c")
    with pytest.raises(ValueError, match="already exists"):
        saving.convert(str(tmp_path / "a"), "saelens", tmp_path / "b", **site)
    assert not (tmp_path / "c").exists()
