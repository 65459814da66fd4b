"""The placement of Gemma's parameters on a mesh, and loading Gemma onto it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.models import registry, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.runtime import devices, sharding
from gemma_scope_jax.runtime.reporting import say


def gemma_placement(mesh: Mesh, split: bool) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The placement of Gemma's parameters, by name and shape: whole on every device, or `split` over all of them.

    The largest dimension that the number of devices divides is split. A parameter without one is small and stays
    whole. The embedding is split along its width: each device then looks up its part of every token's vector.
    """

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        candidates = shape[1:] if name == "input_embedding" else shape
        dividing = [size for size in candidates if size % mesh.size == 0]
        if not split or not dividing:
            return NamedSharding(mesh, sharding.REPLICATED)
        axis = shape.index(max(dividing))
        return NamedSharding(mesh, P(*[None] * axis, ("data", "latent")))

    return place


def placement_of(
    config: config_lib.Config, mesh: jax.sharding.Mesh, model: gm.nn.Transformer, num_layers: int
) -> weights.Placement:
    """The placement of Gemma's parameters; "auto" splits them if they would fill over a quarter of a device."""
    is_split = config.mesh.gemma == "split"
    if config.mesh.gemma == "auto":
        shapes = weights.parameter_shapes(model, num_layers)
        itemsize = jnp.dtype(registry.dtype(config)).itemsize
        whole = sum(leaf.size for leaf in jax.tree.leaves(shapes)) * itemsize
        # The devices of a planned slice cannot report their memory.
        chip = devices.chip_of(mesh.devices.flat[0])
        is_split = whole > (chip.memory if chip else devices.memory_of(jax.local_devices()[0])) / 4
    return gemma_placement(mesh, is_split)


def load(
    name: str,
    path: str,
    dtype: jnp.dtype,
    num_layers: int | None = None,
    mesh: Mesh | None = None,
    placement: weights.Placement | None = None,
) -> Gemma:
    """Loads a model, all of it or only its first `num_layers` blocks.

    Args:
      name: the name of the model.
      path: the path of its weights; if empty, see `registry.weights_path`.
      dtype: the dtype of the parameters, and so of everything the model computes.
      num_layers: the number of blocks to load; None for all.
      mesh: the mesh of devices that will hold it; None for the default device.
      placement: the placement of each parameter; None for whole on every device of the mesh.
    """
    module = registry.build_model(name)
    num_layers = module.config.num_layers if num_layers is None else num_layers
    mesh = mesh or sharding.one_device()
    placement = placement or gemma_placement(mesh, split=False)
    say("Loading Gemma's weights …")
    params = weights.load_params(registry.weights_path(name, path), module, num_layers, dtype, placement)
    return Gemma(name, module, mesh, num_layers, params)


def load_gemma(config: config_lib.Config, layers: int | None = None) -> Gemma:
    """Loads the model of a config onto all devices, or onto one CPU device if this is a single CPU process.

    Args:
      config: the config that names the model.
      layers: the number of blocks to load, from the first; None for all.
    """
    is_one = jax.devices()[0].platform == "cpu" and jax.process_count() == 1
    mesh = sharding.one_device() if is_one else sharding.make_mesh(1, 0)
    module = registry.build_model(config.model)
    layers = module.config.num_layers if layers is None else layers
    dtype = registry.dtype(config)
    placement = placement_of(config, mesh, module, layers)
    return load(config.model, config.weights, dtype, layers, mesh, placement)
