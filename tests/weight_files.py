"""Writes a small model's weights in the formats of transformers, llama.cpp and gemma."""

import json

import gguf
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
import small
import tiny
from gemma.gm.ckpts import _checkpoint

from gemma_scope_jax.models import weights


def params_of(model):
    """Random weights whose gains are multiples of 2⁻¹⁰, so that adding and subtracting 1 is exact."""
    rng = np.random.default_rng(0)

    def draw(keys, leaf):
        value = (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
        return np.round(value * 1024) / 1024 if keys[-1].key == "scale" else value

    return jax.tree.map_with_path(draw, weights.parameter_shapes(model, model.config.num_layers))


GEMMA2 = tiny.TinyGemma()
GEMMA3 = small.model(
    "small_gemma3_1b"
)  # Has norms of queries and keys, and five local blocks for each global one.
PARAMS = params_of(GEMMA2)


def to_hugging_face(params, config, dtype=np.float32):
    """The tensors of a Hugging Face checkpoint, built from the definition of each projection."""
    tensors = {
        "model.embed_tokens.weight": params["embedder"]["input_embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    d, rows = config.embed_dim, lambda w: np.concatenate([head.T for head in w])
    for i in range(config.num_layers):
        block, name = params[f"layer_{i}"], f"model.layers.{i}."
        attn = block["attn"]
        gate, up = block["mlp"]["gating_einsum"]
        if config.transpose_gating_einsum:  # Every model except 2B stores these as Hugging Face does.
            gate, up = gate.T, up.T
        tensors |= {
            name + "self_attn.q_proj.weight": rows(attn["q_einsum"]["w"]),
            name + "self_attn.k_proj.weight": rows(attn["kv_einsum"]["w"][0]),
            name + "self_attn.v_proj.weight": rows(attn["kv_einsum"]["w"][1]),
            name + "self_attn.o_proj.weight": attn["attn_vec_einsum"]["w"].reshape(-1, d).T,
            name + "mlp.gate_proj.weight": gate.T,
            name + "mlp.up_proj.weight": up.T,
            name + "mlp.down_proj.weight": block["mlp"]["linear"].T,
            name + "input_layernorm.weight": block["pre_attention_norm"]["scale"],
            name + "post_attention_layernorm.weight": block["post_attention_norm"]["scale"],
            name + "pre_feedforward_layernorm.weight": block["pre_ffw_norm"]["scale"],
            name + "post_feedforward_layernorm.weight": block["post_ffw_norm"]["scale"],
        }
        if config.use_qk_norm:
            tensors |= {
                name + "self_attn.q_norm.weight": attn["_query_norm"]["scale"],
                name + "self_attn.k_norm.weight": attn["_key_norm"]["scale"],
            }
    return {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}


LLAMA_CPP = {hugging_face: llama_cpp for hugging_face, llama_cpp in weights._NAMES.values()}


def write_hugging_face(folder, dtype=np.float32, model=GEMMA2, params=PARAMS):
    """Writes a small model as transformers saves it, in three shards."""
    folder.mkdir()
    tensors = to_hugging_face(params, model.config, dtype)
    about = {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    if model is GEMMA3:
        about = json.loads((small.FOLDER / "small_gemma3_1b" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about))
    names, index = sorted(tensors), {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[i::3]}
        safetensors.numpy.save_file(part, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_gguf(path, architecture="gemma2", blocks=4, model=GEMMA2, params=PARAMS):
    """Writes a small model as llama.cpp stores it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    for name, tensor in to_hugging_face(params, model.config).items():
        number = name.split(".")[2] if ".layers." in name else ""
        generic = name.replace(f".{number}.", ".{}.", 1) if number else name
        writer.add_tensor(LLAMA_CPP[generic].format(number), tensor + 1 if "norm" in name else tensor)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def write_orbax(path, layout, params=PARAMS, pattern=2):
    """Writes a small model in one of the layouts of gemma's checkpoints, with gemma's own converters."""
    params = jax.tree.map(np.asarray, params)
    # Like Google's tables, the embedding has rows that no token uses. Some layouts have entries that are not needed.
    table = params["embedder"]["input_embedding"]
    params["embedder"]["input_embedding"] = np.concatenate([table, np.full_like(table[:16], 7)])
    tree = {
        "nested": lambda: params,
        "flat": lambda: _checkpoint._nested_to_flat(params),
        "stacked": lambda: jax.tree.map(np.asarray, _checkpoint._nested_to_stacked(params, pattern)),
        "kauldron": lambda: {
            "params": params,
            "step": np.zeros((), np.int32),
            "collections": {},
            "opt_state": ({"count": np.zeros((), np.int32)}, params),
        },
    }[layout]()
    if layout == "flat":
        tree["SigLiPFromPatches_0/siglip_encoder"] = {"w": np.ones((3, 3), np.float32)}
    if layout == "kauldron":
        with ocp.CheckpointManager(path.parent / "manager", item_names=("default",)) as manager:
            manager.save(0, args=ocp.args.Composite(default=ocp.args.StandardSave(tree)))
        (path.parent / "manager" / "0").rename(path)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
