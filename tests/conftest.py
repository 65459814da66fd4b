"""Eight fake devices, strict ranks, and what several tests share."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import tiny

from gemma_scope_jax import gemma

tiny.register()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with the small model's weights and a text of forty documents."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.lay_out(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gemma():
    """The small model with weights on the default device."""
    params = jax.tree.map(jax.numpy.asarray, tiny.params())
    return gemma.Gemma("tiny", tiny.TinyGemma(), params, 4)
