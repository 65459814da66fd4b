"""A Gemma on its mesh: the module, its parameters and the devices that hold them, in one object."""

import dataclasses

import flax.struct
import jax
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.runtime import sharding

# Gemma's parameter tree: nested dicts of arrays, in the layout of `gemma.gm.nn`.
Params = dict


@flax.struct.dataclass
class Gemma:
    """A model with weights, in the form that compiled functions take; only `params` holds arrays."""

    name: str = flax.struct.field(pytree_node=False)
    module: gm.nn.Transformer = flax.struct.field(pytree_node=False)
    mesh: jax.sharding.Mesh = flax.struct.field(pytree_node=False)
    num_layers: int = flax.struct.field(
        pytree_node=False
    )  # The number of blocks in `params`, from the first.
    params: Params

    def __repr__(self) -> str:
        devices = f"{self.mesh.size} device{'' if self.mesh.size == 1 else 's'}"
        return (
            f"Gemma({self.name}, {self.num_layers} of {len(self.layers)} blocks, {self.dtype}, on {devices})"
        )

    @property
    def layers(self) -> range:
        """All of the model's blocks, loaded or not."""
        return range(self.module.config.num_layers)

    @property
    def dtype(self) -> jax.numpy.dtype:
        """The dtype of the parameters, and so of all computation."""
        return self.params["embedder"]["input_embedding"].dtype

    def gathered(self) -> "Gemma":
        """The model with each block's weights whole on every chip; for compiled functions.

        Split weights are gathered when their block runs. Without this constraint the compiler may split a block's
        matrices and communicate activations instead. The embedding stays as it is: looking up a part of each vector
        costs less than gathering 256,000 vectors.
        """
        whole = sharding.constrain(self.mesh, self.params, sharding.REPLICATED)
        return dataclasses.replace(self, params={**whole, "embedder": self.params["embedder"]})

    def whole(self) -> "Gemma":
        """`gathered` with the embedding gathered too, for computing logits."""
        gathered = self.gathered()
        embedder = sharding.constrain(self.mesh, self.params["embedder"], P())
        return dataclasses.replace(self, params={**gathered.params, "embedder": embedder})
