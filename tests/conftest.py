"""Eight fake devices, strict ranks, and what several tests share."""

import json

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import tiny

from gemma_scope_jax import gemma, weights

tiny.register()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with the small model's weights and a text of forty documents."""
    folder = tmp_path_factory.mktemp("inputs")
    weights.save_orbax(str(folder / "weights"), tiny.params())
    rng = np.random.default_rng(1)
    with (folder / "text.jsonl").open("w") as file:
        for number in range(40):
            words = [f"{number}", *rng.choice(["stars", "rivers", "laws", "bread", "song"], size=30)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_gemma():
    """The small model with weights on the default device."""
    params = jax.tree.map(jax.numpy.asarray, tiny.params())
    return gemma.Gemma("tiny", tiny.TinyGemma(), params, 4)
