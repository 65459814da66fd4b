"""Baselines for an SAE's metrics: SAEs of the same L0 that were trained less, or not at all."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.saes import jumprelu
from gemma_scope_jax.saes.attached import Subject

# The number of activations that thresholds are set on.
THRESHOLD_ACTIVATIONS = 2048


def of(subject: Subject, x_BxD: np.ndarray, y_BxO: np.ndarray, seed: int = 0) -> dict[str, Subject]:
    """The baselines of an SAE by name, each with the SAE's L0 on these activations.

    - `top_k`: the same SAE without its thresholds; the k strongest latents fire on each activation, k being the
      rounded L0.
    - `random_decoder`: the SAE's encoder with random decoder directions.
    - `untrained`: a newly initialised autoencoder, with one threshold for all latents that sets the L0.
    - `pca`: the first k principal components; exactly k latents fire on each activation.

    Random decoders get the scale and the bias that fit best, since otherwise these alone would make them fail. The
    last two baselines exist for autoencoders only.

    Args:
      subject: the SAE.
      x_BxD: activations at its input site.
      y_BxO: the activations to reconstruct; x for an autoencoder.
      seed: seeds the random directions.
    """
    x_BxD, y_BxO = (np.asarray(v, np.float32) for v in (x_BxD, y_BxO))
    first_BxD = x_BxD[:THRESHOLD_ACTIVATIONS]
    l0 = sum(int((f_BxM > 0).sum()) for f_BxM in _encoded(subject.sae, first_BxD)) / len(first_BxD)
    k = max(round(l0), 1)
    decoder_key, init_key = jax.random.split(jax.random.key(seed))
    m, o = subject.sae.W_dec.shape
    random_MxO = np.asarray(jumprelu.init(decoder_key, o, m, 1.0).W_dec)
    found = {
        "top_k": dataclasses.replace(
            subject, sae=subject.sae.replace(threshold=np.zeros(m, np.float32)), top_k=k
        ),
        "random_decoder": subject.sae.replace(W_dec=random_MxO, W_skip=None),
    }
    if subject.target_site is None or subject.target_site == subject.site:
        found["untrained"] = _untrained(init_key, x_BxD, m, l0)
        found["pca"] = _principal(x_BxD, k)
    for name in ("random_decoder", "untrained"):
        if name in found:
            found[name] = _fitted(found[name], x_BxD, y_BxO)
    return {
        name: made if isinstance(made, Subject) else dataclasses.replace(subject, sae=made, top_k=None)
        for name, made in found.items()
    }


def _encoded(subject: jumprelu.SAE, x_BxD: np.ndarray) -> Iterator[np.ndarray]:
    """The latents, a block of activations at a time, since those of all may not fit in memory."""
    for start in range(0, len(x_BxD), 256):
        yield np.asarray(jumprelu.encode(subject, jnp.asarray(x_BxD[start : start + 256])))


def _untrained(key: jax.Array, x_BxD: np.ndarray, m: int, l0: float) -> jumprelu.SAE:
    """An SAE from `jumprelu.init`, folded for centred activations, with one threshold for all latents."""
    params = jumprelu.init(key, x_BxD.shape[1], m, 1.0)
    mean_D = x_BxD.mean(0)
    folded = jax.device_get(jumprelu.fold(params, jnp.asarray(mean_D), jnp.ones(())))
    pre_BxM = x_BxD[:THRESHOLD_ACTIVATIONS] @ folded.W_enc + folded.b_enc
    threshold = max(float(np.quantile(pre_BxM, 1 - min(l0 / m, 1))), 0)
    return folded.replace(threshold=np.full(m, threshold, np.float32))


def _principal(x_BxD: np.ndarray, k: int) -> jumprelu.SAE:
    """The projection onto the first k principal components, with a latent for each of their two signs."""
    mean_D = x_BxD.mean(0, dtype=np.float64)
    centred_BxD = x_BxD - mean_D
    _, vectors_DxD = np.linalg.eigh(centred_BxD.T @ centred_BxD)
    V_DxK = vectors_DxD[:, ::-1][:, :k]
    W_enc_DxM = np.concatenate([V_DxK, -V_DxK], axis=1)
    arrays = {
        "W_enc": W_enc_DxM,
        "b_enc": -mean_D @ W_enc_DxM,
        "threshold": np.zeros(2 * V_DxK.shape[1]),
        "W_dec": W_enc_DxM.T,
        "b_dec": mean_D,
    }
    return jumprelu.SAE(**{name: np.asarray(value, np.float32) for name, value in arrays.items()})


def _fitted(subject: jumprelu.SAE, x_BxD: np.ndarray, y_BxO: np.ndarray) -> jumprelu.SAE:
    """The SAE with the decoder scale and the bias that minimise the squared error."""
    recon_BxO = np.concatenate([f_BxM @ subject.W_dec for f_BxM in _encoded(subject, x_BxD)])
    mean_O, target_O = recon_BxO.mean(0), y_BxO.mean(0)
    centred_BxO = recon_BxO - mean_O
    squared = np.square(centred_BxO).sum(dtype=np.float64)
    scale = np.float32((centred_BxO * (y_BxO - target_O)).sum(dtype=np.float64) / max(squared, 1e-30))
    return subject.replace(W_dec=scale * subject.W_dec, b_dec=target_O - scale * mean_O)
