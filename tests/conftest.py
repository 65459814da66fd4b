"""Eight fake devices, no implicit rank promotion, and fixtures for all tests."""

import ctypes
import os

# In programs as small as the tests', LLVM's full optimisation takes longer than it saves. Subprocesses inherit this.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import tiny

from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import reporting, sharding, signals

tiny.register()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with the small model's weights and a text of forty documents."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.lay_out(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gemma():
    """The small model, with its weights on the default device."""
    params = jax.tree.map(jax.numpy.asarray, tiny.params())
    return Gemma("tiny", tiny.TinyGemma(), sharding.one_device(), 4, params)


@pytest.fixture(autouse=True)
def signals_are_not_answered():
    """Checks that no test leaves the command line's signal handlers installed, which could end the test process."""
    yield
    assert signals._command_line is None


@pytest.fixture(autouse=True)
def as_on_the_command_line(request):
    """Prints messages as the command line does, except in tests marked `silent`, which call the library."""
    if request.node.get_closest_marker("silent"):
        yield
        return
    with reporting.speaking():
        yield


@pytest.fixture
def as_any_user():
    """Makes file permissions apply to root too, which could otherwise read and write everything."""
    libc, version, thread = ctypes.CDLL(None, use_errno=True), 0x20080522, 0
    header, sets = (ctypes.c_uint32 * 2)(version, thread), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = effective
    assert libc.capset(header, sets) == 0
