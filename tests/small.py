"""The small models of tests/hugging_face as modules of gemma; tests/peers/hugging_face.py makes the files."""

import functools
import json
import os
import pathlib

import jax

from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.gemma_package import transformer_config as _config
from gemma_scope_jax.models.gemma_package import transformer_modules as _modules

# `make test-peers` makes the models again with transformers, in another folder.
FOLDER = pathlib.Path(os.environ.get("PEERS_FOLDER", pathlib.Path(__file__).parent / "hugging_face"))
NAMES = ("small_gemma2_2b", "small_gemma2_27b", "small_gemma3_1b", "small_gemma3_4b")


@functools.cache
def model(name: str, transpose_gating: bool = True) -> gm.nn.Transformer:
    """The module that a folder's config.json describes; `transpose_gating` is 2B's layout of the gating matrices."""
    found = json.loads((FOLDER / name / "config.json").read_text())
    text = found.get("text_config", found)
    is_gemma3 = text["model_type"] != "gemma2"
    types, norms = _modules.AttentionType, _config.QueryPreAttentionNormalisation
    by_head_dim = text["query_pre_attn_scalar"] == text["head_dim"]
    positions = {}
    if is_gemma3:
        rope = text["rope_parameters"]
        positions = {
            "local_base_frequency": int(rope["sliding_attention"]["rope_theta"]),
            "global_base_frequency": int(rope["full_attention"]["rope_theta"]),
            "global_scale_factor": rope["full_attention"].get("factor", 1.0),
        }
    config = _config.TransformerConfig(
        num_embed=text["vocab_size"],
        embed_dim=text["hidden_size"],
        hidden_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        head_dim=text["head_dim"],
        num_kv_heads=text["num_key_value_heads"],
        final_logit_softcap=text["final_logit_softcapping"],
        attn_logits_soft_cap=text["attn_logit_softcapping"],
        attention_types=tuple(
            types.LOCAL_SLIDING if kind == "sliding_attention" else types.GLOBAL
            for kind in text["layer_types"]
        ),
        sliding_window_size=text["sliding_window"],
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        query_pre_attn_norm=norms.BY_ONE_OVER_SQRT_HEAD_DIM
        if by_head_dim
        else norms.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
        use_qk_norm=is_gemma3,
        transpose_gating_einsum=transpose_gating,
        **positions,
    )
    return gm.nn.Transformer(config=config)


def on_device(name: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """A placement of all arrays on the first device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
