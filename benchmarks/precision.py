"""The errors of Gemma 3 270M's activations and loss in bfloat16, compared with transformers in float32.

    make test-peers && python -m benchmarks.precision .peers [--json=PATH]

Three implementations in bfloat16: gemma's own modules, this package (norms in float32), and transformers.
"""

import argparse
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.models import forward as forward_lib
from gemma_scope_jax.models import placement, predictions
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.sites import Site

LAYERS = (5, 9, 12, 15)
SITES = tuple(
    Site(kind, layer) for kind in ("resid_post", "mlp_out", "attn_out", "mlp_in") for layer in LAYERS
)


def gemmas_norm(
    x: jax.Array, module: gm.nn.RMSNorm, tap: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """The arithmetic of `gm.nn.RMSNorm` in the dtype of `x`."""
    scale_D = module.get_variable("params", "scale").reshape((1,) * (x.ndim - 1) + (-1,))
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return tap(x * jax.lax.rsqrt(variance + 1e-06)) * (1 + scale_D)


@jax.jit
def forward(gemma: Gemma, tokens_1xL: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns losses [L - 1], and activations [L, D] by site."""
    x = forward_lib.embed(gemma, tokens_1xL)
    x, values = forward_lib.run_blocks(gemma, x, tokens_1xL, gemma.layers, read=SITES)
    loss, _ = predictions.next_token_loss(gemma, x, tokens_1xL)
    return loss[0, :-1], {str(site): value[0] for site, value in values.items()}


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """The median over tokens, without BOS, of ‖actual − exact‖ / ‖exact‖."""
    actual, exact = (np.asarray(x, np.float64)[1:] for x in (actual, exact))
    return float(np.median(np.linalg.norm(actual - exact, axis=-1) / np.linalg.norm(exact, axis=-1)))


def measure(folder: pathlib.Path) -> dict:
    """Losses and relative errors of each implementation."""
    want = np.load(folder / "gemma3_270m" / "expected.npz")
    gemma = placement.load("gemma3_270m", str(folder / "gemma3_270m"), jnp.float32)
    tokens = jnp.asarray(want["tokens"])[None]
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), gemma.params)
    results = {
        "float32": forward(gemma, tokens),
        "bfloat16": forward(gemma.replace(params=low), tokens),
    }
    ours, forward_lib.float32_norm = forward_lib.float32_norm, gemmas_norm
    jax.clear_caches()
    results["bfloat16, gemma's norms"] = forward(gemma.replace(params=low), tokens)
    forward_lib.float32_norm = ours
    transformers = {str(site): want[f"bfloat16/{site}"] for site in SITES}
    results["bfloat16, transformers"] = (want["bfloat16/loss"], transformers)
    exact_loss = want["float32/loss"]
    return {
        "tokens": int(want["tokens"].size),
        "transformers_float32_loss": float(exact_loss.mean()),
        "ways": {
            way: {
                "loss": float(np.mean(loss)),
                "largest_loss_difference": float(np.abs(np.asarray(loss) - exact_loss).max()),
                "relative_error": {
                    str(site): relative_error(values[str(site)], want[f"float32/{site}"]) for site in SITES
                },
            }
            for way, (loss, values) in results.items()
        },
    }


def main() -> None:
    """Measures and prints JSON; writes a file if --json is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, help="the folder that tests/peers/hugging_face.py wrote")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    args = parser.parse_args()
    numbers = measure(args.folder)
    print(json.dumps(numbers, indent=1))
    if args.json:
        args.json.write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
