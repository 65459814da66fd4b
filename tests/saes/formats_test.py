"""Exports follow the rules of their formats and can be read back unchanged; damaged files are refused."""

import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gemma_scope_jax.models.sites import Site, site_from_hook
from gemma_scope_jax.runtime import files
from gemma_scope_jax.saes import formats, jumprelu, loading
from gemma_scope_jax.saes.formats import (
    circuit_tracer,
    common,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    saelens,
)

ABOUT = common.About("google/gemma-3-270m", "blocks.9.hook_resid_post", 256, "sotu")


@pytest.fixture
def folded():
    params = jumprelu.init(jax.random.key(0), 16, 64, 0.1)
    params = params.replace(b_enc=jnp.linspace(-1, 1, 64), b_dec=jnp.linspace(0, 2, 16))
    return jax.device_get(jumprelu.fold(params, jnp.ones(16), jnp.asarray(30.0)))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_saelens_round_trip_is_exact(folded, tmp_path):
    saelens.write(tmp_path / "a", folded, ABOUT)
    again, about = saelens.read(tmp_path / "a")
    assert_equal(again, folded)
    assert about == ABOUT
    assert formats.format_of(tmp_path / "a") == "saelens" and formats.format_of(tmp_path) is None


def test_saelens_own_rules_are_kept(folded, tmp_path):
    """`SAE.load_from_disk` of SAELens 6 refuses the folder or misreads it if any of these is missing."""
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


def test_saelens_flattens_heads_only_at_hooks_with_heads(folded, tmp_path):
    saelens.write(
        tmp_path / "a", folded, common.About("google/gemma-3-270m", "blocks.2.attn.hook_z", 256, "sotu")
    )
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["reshape_activations"] == "hook_z"


def transcoder(skip):
    """A folded transcoder from a site of width 16 to a site of width 12."""
    params = jumprelu.init(jax.random.key(0), 16, 64, 0.1, target_width=12, skip=skip)
    if skip:
        params = params.replace(W_skip=jax.random.normal(jax.random.key(1), (16, 12)))
    return jax.device_get(
        jumprelu.fold_transcoder(params, jnp.ones(16), jnp.asarray(30.0), jnp.ones(12), jnp.asarray(7.0))
    )


TRANSCODER = common.About(
    "google/gemma-3-270m", "blocks.9.mlp.hook_in", 256, "sotu", hook_name_out="blocks.9.hook_mlp_out", l0=31.5
)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_round_trip_and_saelens_has_the_transposed_skip_connection(skip, tmp_path):
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
def test_gemma_scope_2_round_trip_is_exact_and_uses_its_names(skip, tmp_path):
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


def test_gemma_scope_1_cannot_hold_a_skip_connection(tmp_path):
    path = gemma_scope.write(tmp_path / "a", transcoder(False), common.About())
    assert_equal(gemma_scope.read(path)[0], transcoder(False))
    with pytest.raises(
        ValueError, match=r"has a skip connection, which .* cannot hold; use --format=gemma_scope_2"
    ):
        gemma_scope.write(tmp_path / "b", transcoder(True), common.About())


def test_gemma_scope_round_trip_is_exact(folded, tmp_path):
    gemma_scope.write(tmp_path / "layer_9", folded, common.About())
    assert_equal(gemma_scope.read(tmp_path / "layer_9" / "params.npz")[0], folded)
    with np.load(tmp_path / "layer_9" / "params.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]


def test_only_an_older_export_is_replaced(folded, tmp_path):
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
        case "norm":
            config["normalize_activations"] = "expected_average_only_in"
            message = "normalize_activations = 'expected_average_only_in'; only 'none' is read"
        case "missing":
            del tensors["threshold"]
            message = r"missing arrays \['threshold'\]"
        case "extra":
            tensors["W_gate"] = np.zeros(64, np.float32)
            message = r"unknown arrays \['W_gate'\]"
        case "skip":
            tensors["W_skip"] = np.zeros((16, 16), np.float32)
            message = "has architecture 'jumprelu', which does not match its tensors"
        case "shape":
            tensors["b_enc"] = tensors["b_enc"][:5]
            message = r"b_enc has shape \(5,\), expected \(64,\)"
        case "nan":
            tensors["b_dec"][3] = np.nan
            message = "b_dec holds non-finite values"
        case _:
            message = "as safetensors: " if change == "truncated" else "does not exist"
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
    gemma_scope.write(path.parent, folded, common.About())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a valid npz file"):
        gemma_scope.read(path)
    np.savez(path, W_enc=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="not a valid npz file"):
        gemma_scope.read(path)


# --- Files of other tools, and files broken on purpose ------------------------------------------------------


# Configs as SAELens 6.43, 5.5 and 2 write them.
SIX = {
    "architecture": "jumprelu", "d_in": 16, "d_sae": 64, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.43.0", "sae_lens_training_version": "6.43.0", "dataset_path": "x/y",
        "hook_name": "blocks.9.hook_resid_post", "model_name": "gemma-2-2b", "model_class_name": "HookedTransformer",
        "hook_head_index": None, "context_size": 32, "seqpos_slice": [None], "model_from_pretrained_kwargs": {},
        "prepend_bos": True,
    },
}  # fmt: skip
FIVE = {
    "architecture": "jumprelu", "d_in": 16, "d_sae": 64, "dtype": "float32", "device": "cpu",
    "model_name": "gemma-2-2b", "hook_name": "blocks.9.hook_resid_post", "hook_layer": 9, "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {}, "apply_b_dec_to_input": False, "finetuning_scaling_factor": False,
    "sae_lens_training_version": "5.5.1", "prepend_bos": True, "dataset_path": "x/y",
    "dataset_trust_remote_code": True, "context_size": 32, "normalize_activations": "none", "neuronpedia_id": None,
}  # fmt: skip
TWO = {
    "model_name": "gemma-2-2b", "hook_point": "blocks.9.hook_resid_post", "hook_point_layer": 9, "d_in": 16,
    "d_sae": 64, "activation_fn": "relu",
}  # fmt: skip


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def of_others(folder, folded, config, **tensors):
    """Writes a folder as SAELens does, with a given config and additional tensors."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(common.arrays(folded) | tensors, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    "config",
    [
        SIX,
        SIX | {"metadata": without(SIX["metadata"], "sae_lens_version")},
        without(SIX, "normalize_activations"),
        FIVE,
        FIVE | {"normalize_activations": False},
        without(FIVE, "normalize_activations", "activation_fn_str", "finetuning_scaling_factor"),
        SIX | {"metadata": SIX["metadata"] | {"hook_name": "model.layers.9"}},
        SIX | {"metadata": SIX["metadata"] | {"hook_name": "model.language_model.layers.9"}},
    ],
    ids=["6", "no version", "no norm", "5", "norm of 1", "defaults of 5", "hugging face", "beside a tower"],
)
def test_configs_of_any_version_are_read_if_unambiguous(config, folded, tmp_path):
    again, about = saelens.read(of_others(tmp_path / "a", folded, config))
    assert_equal(again, folded)
    assert about.model_name == "gemma-2-2b" and about.context_length == 32 and about.text == ""
    assert site_from_hook(about.hook_name) == Site("resid_post", 9)


def test_a_scaling_factor_of_ones_is_ignored_and_any_other_is_refused(folded, tmp_path):
    ones = np.ones(64, np.float32)
    again, _ = saelens.read(of_others(tmp_path / "a", folded, SIX, scaling_factor=ones))
    assert_equal(again, folded)
    for place, factor in (("b", 2 * ones), ("c", ones[:5])):
        with pytest.raises(
            ValueError, match=r"has a scaling_factor other than 1.*save the SAE again without scaling_factor"
        ):
            saelens.read(of_others(tmp_path / place, folded, SIX, scaling_factor=factor))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TWO, "architecture = 'standard', a ReLU SAE without thresholds; only 'jumprelu', "),
        (SIX | {"architecture": "topk"}, "architecture = 'topk'; only 'jumprelu', "),
        (
            without(SIX, "apply_b_dec_to_input"),
            'apply_b_dec_to_input = None; add "apply_b_dec_to_input": true if',
        ),
        (
            FIVE | {"normalize_activations": True},
            "= True; only 'none' is read: .* fold it in with SAELens and save again",
        ),
        (
            SIX | {"normalize_activations": "layer_norm"},
            "'layer_norm'; only 'none' is read: .* cannot be folded",
        ),
        (FIVE | {"activation_fn_str": "tanh-relu"}, "activation_fn = 'tanh-relu' .*; only 'relu'"),
        (FIVE | {"finetuning_scaling_factor": True}, "finetuning_scaling_factor = True; only 'relu' without"),
        (
            SIX | {"architecture": "jumprelu_transcoder"},
            "hook_name_out None; a transcoder must have a hook_name_out, an SAE must not",
        ),
        (SIX | {"metadata": [1]}, "is not a SAELens config: its metadata is not an object"),
        (SIX | {"metadata": {"model_name": 7}}, "is not a SAELens config: model_name is 7"),
        (SIX | {"metadata": {"gemma_scope_jax": [1]}}, "its metadata is not an object"),
    ],
)
def test_unsupported_configs_of_any_version_are_refused_with_the_reason(config, message, folded, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        saelens.read(of_others(tmp_path / "a", folded, config))
    assert "KeyError" not in str(caught.value) and len(str(caught.value)) < 480


def test_errors_about_a_missing_model_or_site_name_the_flags(folded, tmp_path):
    for place, changes, message in (
        (
            "a",
            {"model_name": None},
            "does not name its model and site; give them, for example --model=",
        ),
        ("b", {"model_name": "gpt2-small"}, "unknown model 'gpt2-small'; known: .*give --model, --site"),
        (
            "c",
            {"hook_name": "blocks.9.hook_resid_pre"},
            "unknown site 'blocks.9.hook_resid_pre'; .*give --model, --site",
        ),
    ):
        folder = of_others(tmp_path / place, folded, SIX | {"metadata": SIX["metadata"] | changes})
        with pytest.raises(ValueError, match=message):
            next(loading.read(folder))


@contextlib.contextmanager
def within_seconds(seconds=10):
    """Fails if the block takes longer, also while it waits for the writer of a pipe."""

    def fail(*_):
        raise AssertionError("still waiting")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_devices_and_huge_files_are_refused_in_place_of_any_file_of_any_format(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**42)  # A sparse file.
    places = fuzz.originals(tmp_path / "originals")
    for file in (file for place in places for file in sorted(place.iterdir())):
        content = file.read_bytes()
        for odd in ("pipe", "hole", "/dev/zero", "/proc/self/pagemap"):
            file.unlink()
            file.symlink_to(tmp_path / odd)
            with within_seconds(), pytest.raises(ValueError, match=re.escape(file.name)):
                fuzz.read(file.parent)
        file.unlink()
        file.write_bytes(content)
        fuzz.read(file.parent)


def test_a_huge_sparse_file_with_a_matching_header_is_refused_at_once(folded, tmp_path):
    of_others(tmp_path / "a", folded, SIX)
    d, m = 16, 2**35
    shapes = {"W_enc": (d, m), "W_dec": (m, d), "b_enc": (m,), "threshold": (m,), "b_dec": (d,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with (tmp_path / "a" / "sae_weights.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    with (
        within_seconds(),
        pytest.raises(ValueError, match=r"it has 4,6.* bytes, but at most 137,438,953,472 are read"),
    ):
        saelens.read(tmp_path / "a")


def test_an_archive_that_lists_too_many_members_is_not_opened(folded, tmp_path, monkeypatch):
    gemma_scope.write(tmp_path, folded, common.About())
    dictionary_learning.write(tmp_path / "a", folded, common.About("m", "blocks.3.hook_resid_post"))
    monkeypatch.setattr(files, "_MAX_DIRECTORY", 100)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # It would make an object for each member.
    for read, place in ((gemma_scope.read, "params.npz"), (dictionary_learning.read_torch, "a/ae.pt")):
        with pytest.raises(ValueError, match=r"the list of its members is too long: \d+ bytes"):
            read(tmp_path / place)


@pytest.mark.parametrize("text", ["a: b\n" * 2**18, "[" * 10**4, "{a: " * 10**3, "a: &a [" * 200])
def test_yaml_is_bounded_in_size_and_depth(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"config\.yaml"):
        list(formats.read(tmp_path))
    assert time.monotonic() - started < 1


def test_many_damaged_files_are_read_or_refused_in_limited_memory(tmp_path):
    script = pathlib.Path(__file__).parents[1] / "fuzz.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "1500"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, re.findall(r"\d+", done.stdout))
    assert read + refused == 1500 and refused > 800


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    m = 2**21
    arrays = {"W_enc": np.zeros((8, m), np.float32), "b_enc": np.zeros(m, np.float32)}
    arrays |= {"threshold": arrays["b_enc"], "W_dec": arrays["W_enc"].T, "b_dec": np.zeros(8, np.float32)}
    np.savez_compressed(tmp_path / "params.npz", **arrays)
    assert (tmp_path / "params.npz").stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(ValueError, match="would grow a hundredfold"):
        gemma_scope.read(tmp_path / "params.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_sizes_in_headers_are_checked(folded, tmp_path):
    huge = tmp_path / "a" / "sae_weights.safetensors"
    saelens.write(tmp_path / "a", folded, ABOUT)
    huge.write_bytes((2**40).to_bytes(8, "little") + huge.read_bytes()[8:])
    with pytest.raises(ValueError, match="its header has 1,099,511,627,776 bytes"):
        saelens.read(tmp_path / "a")
    (tmp_path / "a" / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="as JSON: "):
        saelens.read(tmp_path / "a")
    # An array whose header states more values than its archive member has.
    gemma_scope.write(tmp_path, folded, common.About())
    content = (tmp_path / "params.npz").read_bytes()
    (tmp_path / "params.npz").write_bytes(content.replace(b"(16, 64)", b"(99999, 64)"[:8], 1))
    with pytest.raises(ValueError, match="is not a valid npz file"):
        gemma_scope.read(tmp_path / "params.npz")


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


def write_pickle(folder, content):
    with zipfile.ZipFile(folder / "ae.pt", "w") as archive:
        archive.writestr("archive/data.pkl", content)


def test_pickles_that_state_huge_sizes_are_refused_at_once(folded, tmp_path):
    dictionary_learning.write(tmp_path, folded, common.About("m", "blocks.3.hook_resid_post"))
    tracemalloc.start()
    # A bytearray with a stated length of sixteen gigabytes.
    write_pickle(tmp_path, b"\x80\x05" + pickle.BYTEARRAY8 + (2**34).to_bytes(8, "little") + b".")
    with pytest.raises(ValueError, match="is not a valid file of tensors"):
        dictionary_learning.read(tmp_path)
    # A shape of many very long numbers, whose product would take a minute.
    number = b"\x8b" + (100_000).to_bytes(4, "little") + b"\x7f" * 100_000
    shape = b"(" + number + b"q\x01" + b"h\x01" * 100_000 + b"t"
    write_pickle(tmp_path, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + shape + b"R.")
    with pytest.raises(ValueError, match="is not a valid file of tensors"):
        dictionary_learning.read(tmp_path)
    # A pickle that sets attributes of one of our functions.
    write_pickle(tmp_path, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.")
    with pytest.raises(ValueError, match="holds something other than tensors"):
        dictionary_learning.read(tmp_path)
    assert not vars(dictionary_learning._rebuild)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("context_size", 10**29),
        ("context_size", 0),
        ("data_seed", -1),
        ("held_out_fraction", 2.0),
        ("l0", 1e400),
    ],
)
def test_numbers_out_of_range_are_refused(folded, tmp_path, place, value):
    saelens.write(tmp_path, folded, ABOUT)
    config = json.loads((tmp_path / "cfg.json").read_text())
    own = config["metadata"]["gemma_scope_jax"]
    (own if place in own else config["metadata"])[place] = value
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    if value == 0:  # The default is used.
        assert saelens.read(tmp_path)[1].context_length == 1024
        return
    with pytest.raises(ValueError, match="is not a SAELens config"):
        saelens.read(tmp_path)


def test_a_config_with_values_of_other_types_is_refused(tmp_path):
    for text in ('x: !!int ""', "x: !!bool zz", "x: !!timestamp zz", "- a", "a: &a [*a]"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"is not a circuit-tracer config|is not readable YAML"):
            list(formats.read(tmp_path))
    gemma_scope_2.write(tmp_path / "a", transcoder(True), TRANSCODER)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"l0": 10**400}))
    assert gemma_scope_2.read(tmp_path / "a")[1].l0 is None


def test_code_in_pickles_and_yaml_is_not_run(folded, tmp_path):
    dictionary_learning.write(tmp_path / "a", folded, common.About("m", "blocks.3.hook_resid_post"))
    mark = tmp_path / "hacked"
    write_pickle(tmp_path / "a", pickle.dumps({"W_enc": Evil(mark)}, protocol=2))
    with pytest.raises(ValueError, match=r"it names posix\.system, but only tensors are allowed"):
        dictionary_learning.read(tmp_path / "a")
    np.savez(
        tmp_path / "params.npz",
        **{
            name: np.array([Evil(tmp_path / "hacked")])
            for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        },
    )
    with pytest.raises(ValueError, match="is not a valid npz file"):
        gemma_scope.read(tmp_path / "params.npz")
    (tmp_path / "config.yaml").write_text(f"model_kind: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(ValueError, match="is not a circuit-tracer config"):
        list(formats.read(tmp_path / "config.yaml"))
    assert not mark.exists()


def test_members_of_an_archive_are_never_written_to_disk(folded, tmp_path):
    gemma_scope.write(tmp_path, folded, common.About())
    with zipfile.ZipFile(tmp_path / "params.npz", "a") as archive:
        archive.writestr("../../escaped.npy", b"")
    with pytest.raises(ValueError, match=r"unknown arrays \['../../escaped'\]"):
        gemma_scope.read(tmp_path / "params.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["params.npz"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_format_round_trips_bit_for_bit_and_thresholds_are_never_rounded(dtype, folded, tmp_path):
    hook = "blocks.9.hook_resid_post"
    about = common.About("google/gemma-3-270m", hook, 256)
    want = jumprelu.SAE(
        **{name: value.astype(np.float32) for name, value in common.arrays(folded, dtype).items()}
    )
    assert_equal((want.threshold, want.b_enc), (folded.threshold, folded.b_enc))
    saelens.write(tmp_path / "saelens", folded, about, dtype)
    gemma_scope_2.write(tmp_path / "second", folded, about, dtype)
    dictionary_learning.write(tmp_path / "dictionary_learning", folded, about, dtype)
    for place in sorted(tmp_path.iterdir()):
        (found,) = formats.read(place)
        assert_equal(found.sae, want)
        assert (found.about.model_name, found.about.hook_name) == ("google/gemma-3-270m", hook)
    for layer in (0, 1):
        about = dataclasses.replace(TRANSCODER, hook_name=f"blocks.{layer}.mlp.hook_in")
        path = circuit_tracer.write(tmp_path / "set", transcoder(True), about, dtype)
    both, (alone,) = list(formats.read(tmp_path / "set")), formats.read(path)
    want = common.arrays(transcoder(True), dtype)
    for found in (*both, alone):
        assert_equal(common.arrays(found.sae, dtype), want)
    assert [found.about.hook_name for found in both] == ["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in"]
    assert [found.name for found in both] == ["layer_0", "layer_1"] and alone.name == "layer_1"


def test_reading_and_writing_hold_an_sae_in_memory_once(tmp_path):
    """An SAE with a million latents takes 19 GB, so a second copy must not be made."""
    d, m = 256, 2**16
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, d), "b_dec": (d,)}
    large = jumprelu.SAE(**{name: rng.random(shape, np.float32) for name, shape in shapes.items()})
    size = sum(value.nbytes for value in common.arrays(large).values())
    about = common.About("google/gemma-3-270m", "blocks.9.hook_resid_post", 256)
    steps = {
        "saelens": lambda: saelens.write(tmp_path / "saelens", large, about),
        "gemma_scope": lambda: gemma_scope.write(tmp_path / "gemma_scope", large, common.About()),
        "gemma_scope_2": lambda: gemma_scope_2.write(tmp_path / "gemma_scope_2", large, about),
        "dictionary_learning": lambda: dictionary_learning.write(
            tmp_path / "dictionary_learning", large, about
        ),
        "circuit_tracer": lambda: circuit_tracer.write(tmp_path / "circuit_tracer", large, about),
    }
    for name, write in steps.items():
        tracemalloc.start()
        write()
        # Each writer copies a part at a time; the size of a part depends on the format.
        assert tracemalloc.get_traced_memory()[1] < 0.6 * size, name
        tracemalloc.stop()
    for name in steps:
        tracemalloc.start()
        (found,) = formats.read(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * size, name
        tracemalloc.stop()
        np.testing.assert_array_equal(found.sae.W_enc, large.W_enc)


def multi_layer(skip):
    rng = np.random.default_rng(0)

    def layer():
        arrays = {"W_enc": (6, 9), "b_enc": (9,), "threshold": (9,), "W_dec": (9, 3, 6), "b_dec": (6,)}
        arrays |= {"W_skip": (6, 6)} if skip else {}
        return gemma_scope_2.Layer(
            **{k: rng.standard_normal(s).astype(np.float32) for k, s in arrays.items()}
        )

    return [dataclasses.replace(one, threshold=abs(one.threshold)) for one in (layer(), layer(), layer())]


@pytest.mark.parametrize("skip", [False, True])
def test_multi_layer_files_round_trip_and_predict_according_to_the_definition(skip, tmp_path):
    layers = multi_layer(skip)
    gemma_scope_2.write_layers(tmp_path / "a", layers)
    again = gemma_scope_2.read_layers(tmp_path / "a")
    for one, two in zip(layers, again, strict=True):
        assert_equal(vars(one), vars(two))
    names = set(safetensors.numpy.load_file(tmp_path / "a" / "params_layer_2.safetensors"))
    assert names == {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} | (
        {"affine_skip_connection"} if skip else set()
    )
    x = np.random.default_rng(1).standard_normal((3, 5, 6))
    got = gemma_scope_2.predict(again, x)
    for j in range(3):
        for token in range(5):
            want = layers[j].b_dec.astype(float) + (x[j, token] @ layers[j].W_skip if skip else 0)
            for k in range(3):
                for latent in range(9):
                    pre = x[k, token] @ layers[k].W_enc[:, latent] + layers[k].b_enc[latent]
                    if pre > layers[k].threshold[latent]:
                        want = want + max(pre, 0) * layers[k].W_dec[latent, j]
            np.testing.assert_allclose(got[j, token], want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="reads and predicts several layers at once"):
        list(formats.read(tmp_path / "a"))
    (tmp_path / "a" / "params_layer_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"w_dec has shape \(9, 3, 6\), expected \[latents, 2, width\]"):
        gemma_scope_2.read_layers(tmp_path / "a")


def test_googles_folder_names_identify_model_and_site(folded, tmp_path):
    residual = "blocks.{}.hook_resid_post"
    for place, model, hook, out in (
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "google/gemma-2-2b", residual.format(20), None),
        ("gemma-scope-9b-it-res/layer_9/width_131k/average_l0_13", "google/gemma-2-9b-it", residual.format(9), None),
        ("gemma-scope-9b-pt-att/layer_2/width_16k/average_l0_39", "google/gemma-2-9b", "blocks.2.attn.hook_z", None),
        ("gemma-scope-2b-pt-mlp/layer_4/width_16k/average_l0_9", "google/gemma-2-2b", "blocks.4.hook_mlp_out", None),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_44", "google/gemma-2-2b", "hook_embed", None),
        (
            "models--google--gemma-scope-2b-pt-transcoders/snapshots/0/layer_5/width_16k/average_l0_9",
            "google/gemma-2-2b", "blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out",
        ),
    ):  # fmt: skip
        gemma_scope.write(tmp_path / place, folded, common.About())
        (found,) = formats.read(tmp_path / place)
        assert (found.about.model_name, found.about.hook_name, found.about.hook_name_out) == (
            model,
            hook,
            out,
        )
    place = tmp_path / "gemma-scope-2-270m-pt" / "transcoder_all" / "layer_3_width_16k_l0_small_affine"
    gemma_scope_2.write(place, transcoder(True), TRANSCODER)
    (place / "config.json").unlink()  # Some of Google's folders have no config.
    (found,) = formats.read(place)
    assert found.about.model_name == "google/gemma-3-270m"
    assert found.about.hook_name == "model.layers.3.pre_feedforward_layernorm.output"


def test_other_kinds_of_sae_are_refused_by_name(tmp_path):
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "sae.safetensors").touch()
    (tmp_path / "sparsify" / "cfg.json").write_text("{}")
    with pytest.raises(ValueError, match="is a TopK SAE of sparsify"):
        list(formats.read(tmp_path / "sparsify"))
    with pytest.raises(ValueError, match=r"nor an SAE: it has none of cfg\.json"):
        list(formats.read(tmp_path))
    dictionary_learning.write(
        tmp_path / "a", transcoder(False), common.About("m", "blocks.3.hook_resid_post")
    )
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["trainer"]["dict_class"] = "AutoEncoderTopK"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="describes 'AutoEncoderTopK'; only 'JumpReluAutoEncoder' is read"):
        dictionary_learning.read(tmp_path / "a")
