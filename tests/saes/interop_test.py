"""Other tools read our files and we read theirs, with the files of tests/peers/interop.py: `make test-peers`."""

import os
import pathlib

import interop
import numpy as np
import pytest

from gemma_scope_jax.models.sites import Site, site_from_hook
from gemma_scope_jax.saes import formats, jumprelu
from gemma_scope_jax.saes.formats import common

FOLDER = pathlib.Path(os.environ.get("PEERS_FOLDER", "nowhere")) / "interop"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs make test-peers")


def in_float64(one, x):
    """The latents, the reconstruction, and the tokens with a pre-activation too near its threshold to compare."""
    p = {name: None if v is None else np.asarray(v, np.float64) for name, v in vars(one).items()}
    pre = x @ p["W_enc"] + p["b_enc"]
    f = np.where(pre > p["threshold"], np.maximum(pre, 0), 0)
    y = f @ p["W_dec"] + p["b_dec"] + (0 if p["W_skip"] is None else x @ p["W_skip"])
    is_near = np.abs(pre - p["threshold"]).min(1) < 1e-5 * np.linalg.norm(x, axis=1)
    return f, y, is_near


def disagreement(got, expected, is_near):
    """The largest relative error among tokens without a pre-activation near its threshold."""
    assert got.shape == expected.shape
    error = np.linalg.norm(got - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-9)
    return error[~is_near].max()


def test_other_tools_read_our_formats(capsys):
    with np.load(FOLDER / "read.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    lines = []
    for name in sorted({key.rsplit("|", 1)[0] for key in found}):
        kind, loader = name.split("|")
        one = interop.make(kind.removesuffix("_bfloat16")).sae
        if kind.endswith("_bfloat16"):
            one = jumprelu.SAE(**{k: v.astype(np.float32) for k, v in common.arrays(one, "bfloat16").items()})
        f, y, is_near = in_float64(
            one, interop.activations(kind.removesuffix("_bfloat16")).astype(np.float64)
        )
        assert is_near.mean() < 0.05 and 5 < (f > 0).sum(1).mean() < 64
        errors = [disagreement(found[f"{name}|{part}"], want, is_near) for part, want in (("f", f), ("y", y))]
        lines.append((kind, loader, *errors, is_near.sum()))
    with capsys.disabled():
        print(f"\n{'of ours':20}{'read by':34}{'latents':>10}{'output':>10}{'near θ':>8}")
        for kind, loader, of_f, of_y, near in lines:
            print(f"{kind:20}{loader:34}{of_f:10.1e}{of_y:10.1e}{near:8}")
    assert len(lines) >= 22
    for kind, loader, of_f, of_y, _ in lines:
        assert of_f < 1e-5 and of_y < 1e-5, (kind, loader)


def test_saes_saved_by_other_tools_are_read_here(capsys):
    with np.load(FOLDER / "theirs.npz") as arrays:
        made = {name: arrays[name] for name in arrays.files}
    lines = []
    for folder in sorted((FOLDER / "theirs").iterdir()):
        for one in formats.read(folder):
            name = (
                f"{folder.name}/{one.name.removeprefix('layer_')}"
                if one.format == "circuit_tracer"
                else folder.name
            )
            kind = next((k for k in ("attention", "skip", "transcoder") if k in name), "sae")
            kind = "transcoder" if kind == "skip" or one.format == "circuit_tracer" else kind
            x = interop.activations(kind)
            f = jumprelu.encode(one.sae, x)
            _, _, is_near = in_float64(one.sae, x.astype(np.float64))
            y = np.asarray(jumprelu.decode(one.sae, f, x))
            errors = [
                disagreement(np.asarray(got), made[f"{name}|{part}"], is_near)
                for part, got in (("f", f), ("y", y))
            ]
            l0 = [(values > 0).sum(1).mean() for values in (np.asarray(f), made[f"{name}|f"])]
            lines.append((name, *errors, *l0, is_near.sum()))
            site = site_from_hook(one.about.hook_name)
            assert one.about.model_name.endswith("gemma-2-2b") and site.layer in (0, 1, 12)
    with capsys.disabled():
        print(
            f"\n{'of theirs, read here':36}{'latents':>10}{'output':>10}{'L0 here':>10}{'there':>8}{'near θ':>8}"
        )
        for name, of_f, of_y, l0, l0_there, near in lines:
            print(f"{name:36}{of_f:10.1e}{of_y:10.1e}{l0:10.2f}{l0_there:8.2f}{near:8}")
    assert len(lines) == 11
    for name, of_f, of_y, l0, l0_there, near in lines:
        assert of_f < 1e-5 and of_y < 1e-5, name
        assert abs(l0 - l0_there) <= near / 1000 and l0 > 1, name


def test_our_own_files_are_read_unchanged():
    for kind in interop.KINDS:
        one = interop.make(kind)
        for path in [
            FOLDER / "ours" / "saelens" / kind,
            *(FOLDER / "ours" / "hub" / "google").glob(f"{interop.FIRST.get(kind, 'none')}/*/*/*"),
        ]:
            (found,) = formats.read(path)
            for name, value in vars(one.sae).items():
                np.testing.assert_array_equal(getattr(found.sae, name), value)
    place = "gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_7"
    (found,) = formats.read(FOLDER / "ours" / "hub" / "google" / place)
    assert site_from_hook(found.about.hook_name) == Site("mlp_in_gain_free", 12)
    assert found.about.model_name == "google/gemma-2-2b" and found.about.l0 == 7
