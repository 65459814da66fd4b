"""Exports follow the formats' rules and read back as they were written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gemma_scope_jax import sae
from gemma_scope_jax.formats import common, detect, gemma_scope, gemma_scope_2, saelens

ABOUT = common.About("google/gemma-3-270m", "blocks.9.hook_resid_post", 256, "sotu")


@pytest.fixture
def folded():
    params = sae.init(jax.random.key(0), 16, 64, 0.1)
    params = params.replace(b_enc=jnp.linspace(-1, 1, 64), b_dec=jnp.linspace(0, 2, 16))
    return jax.device_get(sae.fold(params, jnp.ones(16), jnp.asarray(30.0)))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_saelens_round_trip_is_exact(folded, tmp_path):
    saelens.write(tmp_path / "a", folded, ABOUT)
    again, about = saelens.read(tmp_path / "a")
    assert_equal(again, folded)
    assert about == ABOUT
    assert detect.format_of(tmp_path / "a") == "saelens" and detect.format_of(tmp_path) is None


def test_saelens_own_rules_are_kept(folded, tmp_path):
    """By `SAE.load_from_disk` of SAELens 6: without any of these it refuses the folder or reads it wrongly."""
    saelens.write(tmp_path / "a", folded, ABOUT)
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu" and config["dtype"] == "float32"
    assert (config["d_in"], config["d_sae"]) == (16, 64)
    assert config["apply_b_dec_to_input"] is False
    assert config["normalize_activations"] == "none" and config["reshape_activations"] == "none"
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "sae_weights.safetensors")
    shapes = {name: (value.shape, value.dtype.name) for name, value in tensors.items()}
    assert shapes == {
        "W_enc": ((16, 64), "float32"), "b_enc": ((64,), "float32"), "threshold": ((64,), "float32"),
        "W_dec": ((64, 16), "float32"), "b_dec": ((16,), "float32"),
    }  # fmt: skip
    np.testing.assert_allclose(np.linalg.norm(tensors["W_dec"], axis=1), 1, atol=1e-5)
    assert (tensors["threshold"] >= 0).all()


def test_heads_are_flattened_by_saelens_only_where_the_hook_gives_heads(folded, tmp_path):
    saelens.write(
        tmp_path / "a", folded, common.About("google/gemma-3-270m", "blocks.2.attn.hook_z", 256, "sotu")
    )
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["reshape_activations"] == "hook_z"


def transcoder(skip):
    """From a site of width 16 to one of width 12."""
    params = sae.init(jax.random.key(0), 16, 64, 0.1, target_width=12, skip=skip)
    if skip:
        params = params.replace(W_skip=jax.random.normal(jax.random.key(1), (16, 12)))
    return jax.device_get(
        sae.fold_transcoder(params, jnp.ones(16), jnp.asarray(30.0), jnp.ones(12), jnp.asarray(7.0))
    )


TRANSCODER = common.About(
    "google/gemma-3-270m", "blocks.9.mlp.hook_in", 256, "sotu", hook_name_out="blocks.9.hook_mlp_out", l0=31.5
)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_come_back_as_they_were_and_saelens_turns_the_skip_connection_over(skip, tmp_path):
    folded = transcoder(skip)
    saelens.write(tmp_path / "a", folded, TRANSCODER)
    again, about = saelens.read(tmp_path / "a")
    assert_equal(again, folded)
    assert about == TRANSCODER
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert config["architecture"] == ("jumprelu_skip_transcoder" if skip else "jumprelu_transcoder")
    assert (config["d_in"], config["d_out"], config["metadata"]["hook_name_out"]) == (
        16,
        12,
        "blocks.9.hook_mlp_out",
    )
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "sae_weights.safetensors")
    if skip:  # SAELens: x @ W_skip.T
        np.testing.assert_array_equal(tensors["W_skip"].T, folded.W_skip)
    assert ("W_skip" in tensors) == skip


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_round_trip_is_exact_and_by_its_own_names(skip, tmp_path):
    folded = transcoder(skip)
    about = common.About(
        "google/gemma-3-270m", "model.layers.9.a.output", hook_name_out="model.layers.9.b.output", l0=31.5
    )
    gemma_scope_2.write(tmp_path / "a", folded, about)
    again, about_again = gemma_scope_2.read(tmp_path / "a")
    assert_equal(again, folded)
    assert about_again == about
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config == {
        "hf_hook_point_in": "model.layers.9.a.output", "hf_hook_point_out": "model.layers.9.b.output", "width": 64,
        "model_name": "google/gemma-3-270m", "architecture": "jump_relu", "l0": 31.5, "affine_connection": skip,
        "type": "transcoder",
    }  # fmt: skip
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "params.safetensors")
    names = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} | (
        {"affine_skip_connection"} if skip else set()
    )
    assert set(tensors) == names
    if skip:  # Google: x @ affine_skip_connection
        assert tensors["affine_skip_connection"].shape == (16, 12)
    config["architecture"] = "topk"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has architecture 'topk'; only 'jump_relu' is read"):
        gemma_scope_2.read(tmp_path / "a")


def test_gemma_scope_1_has_no_place_for_a_skip_connection(tmp_path):
    gemma_scope.write(tmp_path / "a.npz", transcoder(False))
    assert_equal(gemma_scope.read(tmp_path / "a.npz")[0], transcoder(False))
    with pytest.raises(
        ValueError, match=r"has a skip connection, for which .* has no place; --format=gemma_scope_2"
    ):
        gemma_scope.write(tmp_path / "b.npz", transcoder(True))


def test_gemma_scope_round_trip_is_exact(folded, tmp_path):
    gemma_scope.write(tmp_path / "layer_9" / "params.npz", folded)
    assert_equal(gemma_scope.read(tmp_path / "layer_9" / "params.npz")[0], folded)
    with np.load(tmp_path / "layer_9" / "params.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]


def test_an_older_export_is_replaced_and_nothing_else(folded, tmp_path):
    saelens.write(tmp_path / "a", folded, ABOUT)
    (tmp_path / "a" / "evaluation.json").write_text("kept")
    saelens.write(tmp_path / "a", folded, dataclasses.replace(ABOUT, site_mean_O=np.arange(16)))
    assert (tmp_path / "a" / "evaluation.json").read_text() == "kept"
    np.testing.assert_array_equal(saelens.read(tmp_path / "a")[1].site_mean_O, np.arange(16))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        saelens.write(tmp_path / "mine", folded, ABOUT)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "mine"]


@pytest.mark.parametrize(
    "change",
    [
        "no version",
        "old version",
        "norm",
        "missing",
        "extra",
        "skip",
        "shape",
        "nan",
        "truncated",
        "no config",
    ],
)
def test_broken_saelens_folders_are_refused(folded, tmp_path, change):
    folder = tmp_path / "a"
    saelens.write(folder, folded, ABOUT)
    config_path, weights_path = folder / "cfg.json", folder / "sae_weights.safetensors"
    config, tensors = json.loads(config_path.read_text()), safetensors.numpy.load_file(weights_path)
    match change:
        case "no version":
            del config["metadata"]["sae_lens_version"]
            message = "not a SAELens 6 config"
        case "old version":
            config["metadata"]["sae_lens_version"] = "5.9.1"
            message = "not a SAELens 6 config.*its version is 5.9.1"
        case "norm":
            config["normalize_activations"] = "expected_average_only_in"
            message = "normalize_activations = 'expected_average_only_in'; only 'none' is read"
        case "missing":
            del tensors["threshold"]
            message = r"arrays missing \['threshold'\]"
        case "extra":
            tensors["scaling_factor"] = np.zeros(64, np.float32)
            message = r"not known \['scaling_factor'\]"
        case "skip":
            tensors["W_skip"] = np.zeros((16, 16), np.float32)
            message = "has architecture 'jumprelu', which its tensors are not of"
        case "shape":
            tensors["b_enc"] = tensors["b_enc"][:5]
            message = r"b_enc has shape \(5,\), expected \(64,\)"
        case "nan":
            tensors["b_dec"][3] = np.nan
            message = "b_dec holds non-finite values"
        case _:
            message = (
                "not a whole safetensors file"
                if change == "truncated"
                else "holds no SAE|is not readable JSON"
            )
    config_path.write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, weights_path)
    if change == "truncated":
        weights_path.write_bytes(weights_path.read_bytes()[:500])
    if change == "no config":
        config_path.unlink()
    with pytest.raises(ValueError, match=message):
        saelens.read(folder)


def test_broken_npz_files_are_refused(folded, tmp_path):
    path = tmp_path / "params.npz"
    gemma_scope.write(path, folded)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole npz file"):
        gemma_scope.read(path)
    np.savez(path, W_enc=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="not a whole npz file"):
        gemma_scope.read(path)
