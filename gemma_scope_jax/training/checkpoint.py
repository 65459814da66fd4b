"""Orbax checkpoints of the training state, each with a digest of every array.

Orbax notices a truncated file but not a flipped bit or a zeroed block. A digest of each array is therefore computed
on the device when it is saved, and again when it is restored.
"""

import functools
import itertools
import logging
import pathlib
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import NonFiniteError, RunError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.training import step as step_lib


def open_manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    """A manager that saves in the background and keeps the newest `keep` checkpoints."""
    _quiet()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(
        files.for_orbax(folder.absolute()), options=options, item_names=("state", "about")
    )


def open_reader(folder: pathlib.Path) -> ocp.CheckpointManager:
    """A read-only manager, for a run that is possibly being trained.

    Raises:
      ValueError: if the folder does not exist.
    """
    if not folder.exists():
        raise RunError(f"{folder.parent} has no checkpoint yet")
    _quiet()
    # Orbax logs that the manager is read-only, which is what is asked for.
    logger = logging.getLogger("absl")
    logger.addFilter(_is_no_news_of_reading)
    try:
        options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        return ocp.CheckpointManager(
            files.for_orbax(folder.absolute()), options=options, item_names=("state", "about")
        )
    finally:
        logger.removeFilter(_is_no_news_of_reading)


def _is_no_news_of_reading(record: logging.LogRecord) -> bool:
    return not re.search("read_only=True|read only=", record.getMessage())


def newest_step(folder: pathlib.Path) -> int | None:
    """The step of the newest checkpoint in a folder, which can be damaged; None if there is no checkpoint."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return max(steps, default=None)


def _quiet() -> None:
    # Orbax leaves an unfinished task for each array that it cannot read or write. asyncio reports each at length,
    # although Orbax's own error is enough.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _inspect(leaves: list[jax.Array]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The digest of each array, and whether all of its values are finite."""
    whole = leaves[0].sharding
    if isinstance(whole, jax.NamedSharding):
        whole = jax.NamedSharding(
            whole.mesh, jax.P()
        )  # Replicated, so that every host can fetch the results.
    return jax.device_get(_compiled_inspection(whole)(leaves))


@functools.cache
def _compiled_inspection(out: jax.sharding.Sharding) -> Callable:
    def inspect(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        return [(_digest(leaf), jnp.isfinite(leaf).all()) for leaf in leaves]

    return jax.jit(inspect, out_shardings=out)


def _digest(x: jax.Array) -> jax.Array:
    """Two sums of hashed words, uint32[2]. Sums do not depend on an array's layout over devices."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    word = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def mix(h: jax.Array) -> jax.Array:  # MurmurHash3's finaliser
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    seeds = (jnp.uint32(0x9E3779B9), jnp.uint32(0x7F4A7C15))
    return jnp.stack([mix(word + mix(index + seed)).sum(dtype=jnp.uint32) for seed in seeds])


def _named_leaves(state: step_lib.State) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def digests(state: step_lib.State) -> dict[str, list[int]]:
    """The digest of every array of the state, by name.

    Raises:
      FloatingPointError: if an array holds a value that is not finite.
    """
    named = _named_leaves(state)
    inspected = _inspect(list(named.values()))
    # `max_squared_norm` is infinite if every token weighs the same.
    bad = [
        n
        for n, (_, finite) in zip(named, inspected, strict=True)
        if not finite and "max_squared_norm" not in n
    ]
    if bad:
        raise NonFiniteError(f"the state holds non-finite values in {', '.join(bad)}")
    return {name: digest.tolist() for name, (digest, _) in zip(named, inspected, strict=True)}


def save(manager: ocp.CheckpointManager, state: step_lib.State, config: Mapping) -> None:
    """Saves a state under its step, in the background.

    Before the second checkpoint, it checks that the first one can be opened.

    Raises:
      FloatingPointError: if the state is not finite; nothing is saved.
      ValueError: if the first checkpoint cannot be opened.
    """
    step, saved = int(state.step), manager.all_steps()
    if step in saved:
        return
    if len(saved) == 1:
        check_saved(manager)
    shapes = {name: list(leaf.shape) for name, leaf in _named_leaves(state).items()}
    about = {"digests": digests(state), "shapes": shapes, "config": dict(config)}
    manager.save(
        step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave(about))
    )


def check_saved(manager: ocp.CheckpointManager) -> None:
    """Waits until the newest checkpoint is saved, and opens it, because Orbax has reported unreadable ones as saved.

    Raises:
      ValueError: if it cannot be opened.
    """
    manager.wait_until_finished()
    if (step := manager.latest_step()) is None:
        return
    item, options = {"step": jax.ShapeDtypeStruct((), np.int32)}, {"step": ocp.RestoreArgs(np.ndarray)}
    wanted = ocp.args.PyTreeRestore(item, restore_args=options, partial_restore=True)
    try:
        found = manager.restore(step, args=ocp.args.Composite(state=wanted, about=ocp.args.JsonRestore()))
        is_whole = int(found.state["step"]) == step and bool(found.about["digests"])
        reason = "it holds another step"
    except Exception as error:  # Orbax raises errors of many types.
        is_whole, reason = False, printable(repr(error), 200)
    if not is_whole:
        raise RunError(
            f"checkpoint {step} in {manager.directory} was saved but cannot be opened ({reason}); train in another "
            "folder, on a local disk"
        )


class OtherShapesError(ValueError):
    """A checkpoint is whole, but its arrays have other shapes than the run's."""


def _check_shapes(shapes: Mapping[str, list[int]], step: int, abstract_state: step_lib.State) -> None:
    for name, leaf in _named_leaves(abstract_state).items():
        if shapes.get(name) != list(leaf.shape):
            raise OtherShapesError(
                f"checkpoint {step} holds {name} of shape {shapes.get(name)}, but this run needs {list(leaf.shape)}"
            )


def restore_newest(
    manager: ocp.CheckpointManager,
    make_abstract: Callable[[Mapping[str, list[int]]], step_lib.State],
    set_aside: bool,
) -> step_lib.State | None:
    """Restores the newest checkpoint that is whole; returns None if there is no checkpoint.

    With one process, damaged checkpoints are skipped. With several processes, a damaged checkpoint is an error.

    Args:
      manager: the manager of the checkpoints.
      make_abstract: a function from the saved shapes, by name, to the state to restore, as shapes with shardings. An
        array that it replaces by None is not restored.
      set_aside: whether to move damaged checkpoints to `damaged/` beside the checkpoints, so that their steps can be
        saved again. They are moved only if a whole checkpoint is found.

    Raises:
      ValueError: if there are checkpoints but no checkpoint can be read; they stay where they are.
      OSError: if the file system cannot be read, which does not mean that a checkpoint is damaged.
    """
    damaged: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
            abstract_state = make_abstract(about["shapes"])
            _check_shapes(about["shapes"], step, abstract_state)
            restore_args = jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), abstract_state
            )
            # StandardRestore cannot leave out a part of the state.
            wanted = ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args, partial_restore=True)
            state = manager.restore(step, args=ocp.args.Composite(state=wanted)).state
            changed = [name for name, value in digests(state).items() if about["digests"][name] != value]
            if not changed:
                for number, reason in damaged.items():
                    if set_aside:
                        _move_aside(manager, number, reason)
                    else:
                        say(f"Skipping checkpoint {number}, which cannot be read: {reason}")
                if damaged and set_aside:
                    manager.reload()
                return state
            damaged[step] = f"its contents differ from what was saved, in {', '.join(changed)}"
        except (MemoryError, jax.errors.JaxRuntimeError, OtherShapesError):
            raise  # Not the checkpoint's fault.
        except Exception as error:  # Orbax raises errors of many types for a damaged checkpoint.
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise
            files.check_readable(pathlib.Path(manager.directory) / str(step))
            if jax.process_count() > 1:  # All hosts must restore the same checkpoint.
                reason = " ".join(repr(error).split())[:200]
                raise RunError(
                    f"checkpoint {step} in {manager.directory} cannot be read by this process ({reason}); move it "
                    "away, or run with one process, which sets it aside"
                ) from error
            damaged[step] = " ".join(repr(error).split())[:200]
    if damaged:
        raise RunError(
            f"no checkpoint in {manager.directory} can be read ({damaged[max(damaged)]}); nothing was changed. "
            "If the run is being trained, try again; otherwise start a new run in another folder"
        )
    return None


def _move_aside(manager: ocp.CheckpointManager, step: int, reason: str) -> None:
    folder = pathlib.Path(manager.directory).parent / "damaged"
    folder.mkdir(exist_ok=True)
    # The same step can be damaged more than once.
    names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(1)))
    aside = next(folder / name for name in names if not (folder / name).exists())
    say(f"Checkpoint {step} is damaged and was moved to {aside}: {reason}")
    (pathlib.Path(manager.directory) / str(step)).rename(aside)
