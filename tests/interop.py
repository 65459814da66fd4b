"""Writes SAEs of every kind in every format; tests/peers/interop.py reads them with other tools.

python tests/interop.py FOLDER
"""

import pathlib
import shutil
import sys

import numpy as np

from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import loading, saving
from gemma_scope_jax.saes.formats import circuit_tracer, common
from gemma_scope_jax.saes.jumprelu import SAE

D, M, LAYER = 48, 128, 12
KINDS = {
    "sae": ("resid_post", None),
    "attention": ("attn_out", None),
    "transcoder": ("mlp_in_gain_free", "mlp_out"),
    "skip": ("mlp_in", "mlp_out"),
}
# The repositories and folders in which other loaders look for them.
FIRST = {
    "sae": "gemma-scope-2b-pt-res",
    "attention": "gemma-scope-2b-pt-att",
    "transcoder": "gemma-scope-2b-pt-transcoders",
}
SECOND = {"sae": "resid_post", "attention": "attn_out", "transcoder": "transcoder", "skip": "transcoder"}


def make(kind: str) -> loading.LoadedSAE:
    """An SAE with unit decoder rows, for activations of norm about √D, on which a quarter of its latents fire."""
    rng = np.random.default_rng(list(KINDS).index(kind))
    W_dec = rng.standard_normal((M, D))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    arrays = {
        "W_enc": W_dec.T + 0.1 * rng.standard_normal((D, M)),
        "b_enc": 0.1 * rng.standard_normal(M),
        "threshold": rng.uniform(0, 1.5, M),
        "W_dec": W_dec,
        "b_dec": rng.standard_normal(D),
        "W_skip": 0.3 * rng.standard_normal((D, D)) if kind == "skip" else None,
    }
    folded = SAE(**{k: None if v is None else v.astype(np.float32) for k, v in arrays.items()})
    reads, predicts = KINDS[kind]
    site = Site(reads, LAYER)
    target = Site(predicts, LAYER) if predicts else site
    about = common.About(context_length=128, text="sotu", l0=32.0)
    return loading.LoadedSAE(kind, folded, about, "gemma2_2b", site, target)


def activations(kind: str) -> np.ndarray:
    """A thousand raw activations."""
    rng = np.random.default_rng(100 + list(KINDS).index(kind))
    return (1 + rng.standard_normal((1000, D))).astype(np.float32)


def main(folder: pathlib.Path) -> None:
    """Writes the SAEs and the activations to `folder`."""
    ours = folder / "ours"
    shutil.rmtree(ours, ignore_errors=True)
    for kind in KINDS:
        one = make(kind)
        saving.write(ours / "saelens" / kind, "saelens", one)
        saving.write(ours / "saelens" / f"{kind}_bfloat16", "saelens", one, "bfloat16")
        if kind in FIRST:
            place = ours / "hub" / "google" / FIRST[kind] / f"layer_{LAYER}" / "width_16k" / "average_l0_7"
            saving.write(place, "gemma_scope", one)
        affine = "_affine" if kind == "skip" else ""
        place = f"{SECOND[kind]}/layer_{LAYER}_width_16k_l0_medium{affine}"
        saving.write(ours / "hub" / "google" / "gemma-scope-2-1b-pt" / place, "gemma_scope_2", one)
        if one.site == one.target_site:
            saving.write(ours / "dictionary_learning" / kind, "dictionary_learning", one)
        else:
            for layer in range(2):
                about = common.About(hook_name=f"blocks.{layer}.mlp.hook_in")
                circuit_tracer.write(ours / "circuit_tracer" / kind, one.sae, about)
            saving.write(ours / "circuit_tracer" / kind, "circuit_tracer", one)
    np.savez(folder / "activations.npz", **{kind: activations(kind) for kind in KINDS})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
