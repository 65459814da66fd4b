"""A Gemma on its mesh: the one handle of a module, its parameters, and the devices that they lie on."""

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
    """A model with weights, as compiled functions take it: only `params` are arrays."""

    name: str = flax.struct.field(pytree_node=False)
    module: gm.nn.Transformer = flax.struct.field(pytree_node=False)
    mesh: jax.sharding.Mesh = flax.struct.field(pytree_node=False)
    num_layers: int = flax.struct.field(pytree_node=False)  # Blocks that `params` have, the first ones.
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
        """Of the parameters, and so of all that is computed."""
        return self.params["embedder"]["input_embedding"].dtype

    def gathered(self) -> "Gemma":
        """Blocks whole on each chip, gathered when their turn comes if they were split; for compiled functions.

        Said here, or the compiler may split a block's matrices and send activations about instead. The embedding
        stays as it is: looking up a part of each vector costs less than gathering 256,000 of them.
        """
        whole = sharding.constrain(self.mesh, self.params, sharding.REPLICATED)
        return dataclasses.replace(self, params={**whole, "embedder": self.params["embedder"]})

    def whole(self) -> "Gemma":
        """`gathered`, and the embedding too, where it makes logits."""
        gathered = self.gathered()
        embedder = sharding.constrain(self.mesh, self.params["embedder"], P())
        return dataclasses.replace(self, params={**gathered.params, "embedder": embedder})
