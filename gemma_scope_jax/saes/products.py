"""The precision of an update's matrix products.

A TPU multiplies in bfloat16 and sums in float32. A float32 product therefore takes one pass at `default`, which
rounds both operands to bfloat16; three passes at `high`; and six at `highest`, which equals float32. A CPU always
multiplies in float32. There, `emulated_default` and `emulated_high` compute what one and three passes give.
"""

import dataclasses

import jax
import jax.numpy as jnp

EMULATED_PASSES = {"emulated_default": 1, "emulated_high": 3}


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of each product of an update: `default`, `high`, `highest` or an emulated one."""

    encode: str = "highest"  # x W_enc
    decode: str = "highest"  # f W_dec, and x W_skip of a skip connection
    latent_gradient: str = "highest"  # ∂L/∂f, from the reconstruction's gradient and W_dec
    encoder_gradient: str = "highest"  # ∂L/∂W_enc
    decoder_gradient: str = "highest"  # ∂L/∂W_dec, and ∂L/∂W_skip

    @classmethod
    def of(cls, name: str) -> "Precision":
        """The same precision for all products."""
        return cls(name, name, name, name, name)


HIGHEST = Precision()


def matmul(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
    """The product of two float32 matrices at a precision of JAX, or at an emulated one."""
    if precision not in EMULATED_PASSES:
        return jnp.matmul(a, b, precision=jax.lax.Precision(precision))
    (a1, a2), (b1, b2) = _bfloat16_parts(a), _bfloat16_parts(b)
    if EMULATED_PASSES[precision] == 1:
        return jnp.matmul(a1, b1)
    return jnp.matmul(a1, b1) + (jnp.matmul(a1, b2) + jnp.matmul(a2, b1))


def _bfloat16_parts(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 array rounded to bfloat16, and the remainder rounded to bfloat16; both stay float32 arrays."""
    # Not a cast to bfloat16 and back, which the compiler may remove.
    first = jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
    return first, jax.lax.reduce_precision(value - first, exponent_bits=8, mantissa_bits=7)
