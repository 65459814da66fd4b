"""SAEs of files: of which model and site, and in whose units."""

import dataclasses

import numpy as np
import pytest

from gemma_scope_jax import export, gemma, opening, sae, stored
from gemma_scope_jax.formats import common, gemma_scope, saelens


def made(site, target_site=None, d=32, o=32):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (d, 64), "b_enc": (64,), "threshold": (64,), "W_dec": (64, o), "b_dec": (o,)}
    folded = sae.SAE(**{name: rng.random(shape, np.float32) for name, shape in shapes.items()})
    return stored.Stored("x", folded, common.About(), "tiny", site, target_site or site)


def test_what_a_file_does_not_say_is_asked_for_and_checked(tmp_path):
    one = made(gemma.Site("resid_post", 2))
    gemma_scope.write(tmp_path / "params.npz", one.sae)
    with pytest.raises(
        ValueError, match="does not say of which model and site it is; give them, for example"
    ):
        list(stored.read(tmp_path / "params.npz"))
    (found,) = stored.read(tmp_path / "params.npz", "tiny", "layer_2_resid_post")
    assert (found.site, found.target_site) == (gemma.Site("resid_post", 2),) * 2
    (found,) = stored.read(tmp_path, "tiny", "layer_2_mlp_in_gain_free", "layer_2_mlp_out")
    assert found.target_site == gemma.Site("mlp_out", 2)
    for site, message in (
        ("layer_7_resid_post", "layer 7 is out of range"),
        ("layer_2_attn_out", "takes activations of width 32, but layer_2_attn_out of tiny has width 64"),
        ("resid", "no site is known by the name 'resid'; sites are called as in layer_9_resid_post"),
    ):
        with pytest.raises(ValueError, match=message):
            list(stored.read(tmp_path / "params.npz", "tiny", site))


def test_sites_are_known_by_all_their_names():
    for kind, names in gemma.SITES.items():
        layer = 0 if kind == "embed" else 5
        site = gemma.Site(kind, layer)
        for name in (str(site), *(name.format(layer) for name in names if name)):
            assert gemma.site_from_hook(name) == site
    assert gemma.name_from_hugging_face("gemma-2-9b-it") == "gemma2_9b-it"


def test_gemma_scopes_embedding_saes_read_what_the_models_stream_has_times_the_root_of_d(tmp_path):
    one = made(gemma.Site("embed", 0))
    export.write(tmp_path / "a", "gemma_scope", export.in_convention("gemma_scope", one, {}))
    theirs, _ = gemma_scope.read(tmp_path / "a" / "params.npz")
    (again,) = stored.read(tmp_path / "a", "tiny", "embed")
    stream = np.random.default_rng(1).standard_normal((50, 32)).astype(np.float32)
    want = sae.decode(one.sae, sae.encode(one.sae, stream))
    np.testing.assert_allclose(sae.decode(again.sae, sae.encode(again.sae, stream)), want, rtol=1e-5)
    of_embedding = sae.decode(theirs, sae.encode(theirs, stream / 32**0.5))
    np.testing.assert_allclose(of_embedding, np.asarray(want) / 32**0.5, rtol=1e-5)
    # SAELens' folders are of the stream, as TransformerLens' hook is.
    export.write(tmp_path / "b", "saelens", export.in_convention("saelens", one, {}))
    np.testing.assert_array_equal(saelens.read(tmp_path / "b")[0].b_enc, one.sae.b_enc)


@pytest.mark.parametrize("file_format", ["saelens", "gemma_scope", "gemma_scope_2", "dictionary_learning"])
def test_an_sae_is_evaluated_alike_in_whatever_format_it_is(file_format, inputs, tmp_path, monkeypatch):
    one = made(gemma.Site("resid_post", 1))
    one = dataclasses.replace(one, about=dataclasses.replace(one.about, context_length=16))
    export.write(tmp_path / "a", file_format, one)
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


def test_converting_goes_by_way_of_files(tmp_path, capsys):
    one = made(gemma.Site("resid_post", 1))
    export.write(tmp_path / "a", "gemma_scope", one)
    site = {"model": "tiny", "site": "layer_1_resid_post"}
    (path,) = export.convert(str(tmp_path / "a"), "saelens", tmp_path / "b", **site)
    again, about = saelens.read(path)
    np.testing.assert_array_equal(again.W_dec, one.sae.W_dec)
    assert (about.model_name, about.hook_name) == ("test/tiny", "blocks.1.hook_resid_post")
    with pytest.raises(ValueError, match="is no transcoder, and circuit-tracer reads nothing else"):
        export.convert(str(tmp_path / "b"), "circuit_tracer", tmp_path / "c")
    with pytest.raises(ValueError, match="is there already"):
        export.convert(str(tmp_path / "a"), "saelens", tmp_path / "b", **site)
    assert not (tmp_path / "c").exists()
