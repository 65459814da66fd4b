"""A program that loads a Gemma with blocks of several megabytes and prints the memory that loading took.

python tests/loads.py PATH BLOCKS COUNT...
"""

import ctypes
import dataclasses
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tiny import TinyGemma

from gemma_scope_jax.models import weights
from gemma_scope_jax.models.gemma_package import gm


def model(blocks: int) -> gm.nn.Transformer:
    """A Gemma with blocks of 9.4 MB in float32 and an embedding of half a megabyte."""
    small = TinyGemma().config
    config = dataclasses.replace(
        small,
        embed_dim=512,
        hidden_dim=1280,
        head_dim=64,
        attention_types=tuple(small.attention_types[i % 2] for i in range(blocks)),
    )
    return TinyGemma(config=config)


def params(blocks: int) -> dict:
    """Random weights of the model, which do not compress well."""
    rng = np.random.default_rng(0)
    shapes = weights.parameter_shapes(model(blocks), blocks)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def resident(key: str) -> int:
    """This process's memory in bytes: `VmRSS` is the current value, `VmHWM` the peak."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def bytes_read() -> int:
    """The number of bytes that this process has read so far, from disk or from the page cache."""
    return int(re.search(r"rchar: (\d+)", pathlib.Path("/proc/self/io").read_text())[1])


def main() -> None:
    """Prints, for each count of blocks, the parameters' bytes and the peak of the other bytes held during loading."""
    path, stored, *counts = sys.argv[1], *map(int, sys.argv[2:])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def load(count: int) -> weights.Params:
        return weights.load_params(path, model(stored), count, jnp.float32, lambda name, shape: device)

    jax.block_until_ready(load(2))  # Warm up: imports, compilations and thread pools.
    for count in counts:
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
        loaded = jax.block_until_ready(load(count))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
        print(json.dumps({"blocks": count, "parameters": size, "beside": resident("VmHWM") - before - size}))
        del loaded


if __name__ == "__main__":
    main()
