"""A small Gemma with the real structure, and the config of a run that trains on it in a second or two.

`python tests/tiny.py JSON` registers the small model and then works like train.py or evaluate.py.
"""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import numpy as np

from gemma_scope_jax import config
from gemma_scope_jax.models import masking, registry, tokenizer, weights
from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.gemma_package import transformer_config as _config
from gemma_scope_jax.models.gemma_package import transformer_modules as _modules

LOCAL, GLOBAL = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL


class TinyGemma(gm.nn.Transformer):
    """Four blocks like Gemma 2's, with grouped queries, both soft-caps, a window shorter than a row, and N·H ≠ D."""

    config: _config.TransformerConfig = _config.TransformerConfig(
        num_embed=272,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        final_logit_softcap=3.0,
        attn_logits_soft_cap=5.0,
        attention_types=(LOCAL, GLOBAL, LOCAL, GLOBAL),
        sliding_window_size=6,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        query_pre_attn_norm=_config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM,
    )


# A token is a byte, numbered after the special tokens. The words of the chat template are single tokens.
_WORDS = {"<start_of_turn>": 260, "<end_of_turn>": 261, "user": 262, "model": 263}


def encode(text: str) -> list[int]:
    """The token ids of a text."""
    pieces = re.split("(user|model)", text)
    return [i for p in pieces for i in ([_WORDS[p]] if p in _WORDS else [3 + byte for byte in p.encode()])]


def load_tokenizer() -> tokenizer.Tokenizer:
    """The tokenizer of the small model."""

    def decode(ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")

    ids = {"<pad>": masking.PAD, "<eos>": masking.EOS, "<bos>": masking.BOS, **_WORDS}
    return tokenizer.Tokenizer(encode, decode, ids.get, 272)


def register() -> None:
    """Registers the small model under the name `tiny`."""
    registry.register("tiny", registry.ModelSpec(TinyGemma(), "test/tiny", "gs://none/tiny", load_tokenizer))


def params(scale: float = 0.3) -> dict:
    """Random weights of the small model, on the host."""
    shapes = jax.eval_shape(TinyGemma().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), np.int32))[
        "params"
    ]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (scale * rng.normal(size=s.shape)).astype(np.float32), shapes)


def lay_out(folder: pathlib.Path) -> None:
    """Writes the folder `weights` and `text.jsonl`, a text of forty documents."""
    weights.save_orbax(str(folder / "weights"), params())
    rng = np.random.default_rng(1)
    with (folder / "text.jsonl").open("w") as file:
        for number in range(40):
            words = [f"{number}", *rng.choice(["stars", "rivers", "laws", "bread", "song"], size=30)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def tokens(rows: int, length: int, seed: int = 0, special: float = 0.0) -> np.ndarray:
    """Random packed rows: some with two segments, some padded, and a share `special` of EOS tokens."""
    rng = np.random.default_rng(seed)
    made = rng.integers(3, 259, size=(rows, length)).astype(np.int32)
    made[rng.random(made.shape) < special] = masking.EOS
    made[:, 0] = masking.BOS
    made[::2, length // 3] = masking.BOS
    made[::3, length - 3 :] = masking.PAD
    return made


def run_config(folder: pathlib.Path, **changes: object) -> config.Config:
    """The config of a run on the small model.

    Args:
      folder: contains `weights` and `text.jsonl`, as written by `lay_out`.
      **changes: values of fields by dotted name, where `__` replaces each dot.
    """
    c = config.defaults()
    if "banks" in changes:
        c.banks = {name: config.bank_fields(**fields) for name, fields in changes.pop("banks").items()}
    else:
        changes = {
            "banks__main__layers": (1,),
            "banks__main__width": 64,
            "banks__main__bandwidth": 0.1,
            "banks__main__initial_threshold": 0.1,
            **changes,
        }
    c.update_from_flattened_dict(
        {
            "model": "tiny",
            "weights": str(folder / "weights"),
            "gemma_dtype": "float32",
            "data.text": str(folder / "text.jsonl"),
            "data.context_length": 16,
            "data.held_out_fraction": 0.2,
            "data.folder": str(folder / "rows"),
            "train.tokens": 8 * 16 * 10,
            "train.sequences_per_step": 8,
            "train.batch": 32,
            "ring.capacity": 8 * 16 * 4,
            "ring.groups": 8,
            "normalizer.rows": 16,
            "normalizer.center": True,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_updates": 4,
            "optimizer.sparsity_warmup_updates": 8,
            "log.checkpoint_every": 3,
            "mesh.data": 1,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
    )
    return config.from_dict(c.to_dict())


def main() -> None:
    """Trains with the `config` and `workdir` of the JSON argument, or evaluates with its `evaluate` arguments."""
    register()
    from gemma_scope_jax.cli import common
    from gemma_scope_jax.cli import evaluate as evaluate_cli
    from gemma_scope_jax.runtime import distributed
    from gemma_scope_jax.training import loop

    given = json.loads(sys.argv[1])
    if "evaluate" in given:

        def evaluate() -> None:
            distributed.initialize(heartbeat_timeout_seconds=10)
            evaluate_cli.evaluate_path(**given["evaluate"] | {"out": pathlib.Path(given["evaluate"]["out"])})

        common.run(evaluate)
        return
    made = config.from_dict(given["config"])

    def train() -> None:
        distributed.initialize(**dataclasses.asdict(made.hosts), saves_together=True)
        loop.train(made, pathlib.Path(given["workdir"]))

    common.run(train, "nothing has been trained yet")


if __name__ == "__main__":
    main()
