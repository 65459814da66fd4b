"""Counts JAX's compilations in this process by its public monitoring events."""

import collections

import jax

_compiled: collections.Counter[str] = collections.Counter()


def _listen(event: str, duration: float, **details: object) -> None:
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[str(details.get("fun_name")).removeprefix("jit(").removesuffix(")")] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def so_far(*names: str) -> int:
    """The number of compilations of the named functions since this module's import; without names, of all."""
    return sum(_compiled[name] for name in names) if names else _compiled.total()
