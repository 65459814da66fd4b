"""Writes small random Gemmas and the real 270M with transformers, and its results as references for parity_test.py.

    python tests/peers/hugging_face.py OUT [GGUF]            in an environment with torch and transformers

Writes a folder for each small model. It contains the checkpoint as transformers saves it (config.json, safetensors
shards, index) and expected.npz, with the logits and every site of three documents alone, and of two documents as a
padded batch. Given the GGUF file of Gemma 3 270M, also writes the folder gemma3_270m: the weights that transformers
dequantises, and the losses and every site of a text, in float32 and in bfloat16.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

VOCABULARY = 160
LENGTHS = (24, 17, 7)  # The second and third document fill a packed row of 24.
LAYERS = (0, 1, 3)  # Both sliding and global layers.
_COMMON = dict(
    vocab_size=VOCABULARY,
    num_key_value_heads=2,
    sliding_window=6,
    max_position_embeddings=64,
    hidden_activation="gelu_pytorch_tanh",
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    attn_implementation="eager",
)
_GEMMA2 = dict(
    **_COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=16,  # N·H ≠ D
    query_pre_attn_scalar=16,  # The head width, as in 2B and 9B.
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)
_GEMMA3 = dict(
    **_COMMON,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=7,  # Layer 5 is the only global layer.
    num_attention_heads=4,
    head_dim=16,
    query_pre_attn_scalar=16,
)
_VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    vision_use_head=False,
)


def make_models() -> dict[str, transformers.PreTrainedModel]:
    """The models by name; each has a feature that the others lack."""
    gemma2, gemma3 = transformers.Gemma2Config, transformers.Gemma3TextConfig
    two_d = dict(_GEMMA2, query_pre_attn_scalar=9, hidden_size=36)  # D / N ≠ the head width, as in 27B.
    # Linear scaling of the global layers' positions by 8, as in 4B and larger models.
    scaled = dict(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    )
    vision = transformers.Gemma3Config(
        text_config=gemma3(**_GEMMA3, **scaled).to_dict(),
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
        attn_implementation="eager",
    )
    return {
        "small_gemma2_2b": transformers.Gemma2ForCausalLM(gemma2(**_GEMMA2)),
        "small_gemma2_27b": transformers.Gemma2ForCausalLM(gemma2(**two_d)),
        "small_gemma3_1b": transformers.Gemma3ForCausalLM(gemma3(**dict(_GEMMA3, num_key_value_heads=1))),
        "small_gemma3_4b": transformers.Gemma3ForConditionalGeneration(vision),
    }


def randomize(model: transformers.PreTrainedModel) -> None:
    """Sets every weight, norms included, to random values of bfloat16; initial values could hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            values = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.to(torch.bfloat16).float())


def text_model(model: transformers.PreTrainedModel) -> torch.nn.Module:
    """The text model, which has the blocks."""
    return getattr(model.model, "language_model", model.model)


def run(
    model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray, layers: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The logits and sites, captured by hooks on transformers' own modules."""
    seen = {}
    text = text_model(model)
    handles = []

    def keep(name: str, of_input: bool) -> callable:
        def hook(module, args, output):
            value = args[0] if of_input else output
            seen[name] = (value[0] if isinstance(value, tuple) else value).detach().float().numpy()

        return hook

    def gain_free(name: str, eps: float) -> callable:
        def hook(module, args, output):
            x = args[0].detach().double().numpy()
            seen[name] = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)

        return hook

    def first_input(module, args):
        seen["embed"] = args[0].detach().float().numpy()

    handles.append(text.layers[0].register_forward_pre_hook(first_input))
    for layer in layers:
        block = text.layers[layer]
        for module, name, of_input in (
            (block, "resid_post", False),
            (block.post_feedforward_layernorm, "mlp_out", False),
            (block.self_attn.o_proj, "attn_out", True),
            (block.pre_feedforward_layernorm, "mlp_in", False),
        ):
            handles.append(module.register_forward_hook(keep(f"layer_{layer}_{name}", of_input)))
        handles.append(
            block.pre_feedforward_layernorm.register_forward_hook(
                gain_free(f"layer_{layer}_mlp_in_gain_free", 1e-6)
            )
        )
    with torch.no_grad():
        output = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    for handle in handles:
        handle.remove()
    return {"logits": output.logits.float().numpy(), **seen}


def write_small(out: pathlib.Path) -> None:
    """Writes every small model's folder."""
    rng = np.random.default_rng(0)
    documents = [np.array([2, *rng.integers(3, VOCABULARY - 8, size=n - 1)]) for n in LENGTHS]
    for name, model in make_models().items():
        randomize(model)
        model.float().eval()
        layers = LAYERS if len(text_model(model).layers) == 4 else (*LAYERS, 5)
        arrays = {f"tokens_{i}": tokens.astype(np.int32) for i, tokens in enumerate(documents)}
        for i, tokens in enumerate(documents):
            for key, value in run(model, tokens[None], np.ones((1, tokens.size), np.int64), layers).items():
                arrays[f"alone_{i}/{key}"] = value[0].astype(np.float32)
        padded = np.stack([np.pad(tokens, (0, LENGTHS[0] - tokens.size)) for tokens in documents[:2]])
        # The first row repeats the first document; the second row is kept without its padding.
        for key, value in run(model, padded, (padded != 0).astype(np.int64), layers).items():
            arrays[f"padded/{key}"] = value[1, : LENGTHS[1]].astype(np.float32)
        folder = out / name
        # Several shards, like large models; one model is stored in bfloat16, the others in float32.
        saved = model.to(torch.bfloat16) if name == "small_gemma2_2b" else model
        saved.save_pretrained(folder, max_shard_size="60KB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "expected.npz", **arrays)


TEXT = """The Congress shall have Power To lay and collect Taxes, Duties, Imposts and Excises, to pay the Debts and
provide for the common Defence and general Welfare of the United States; but all Duties, Imposts and Excises shall be
uniform throughout the United States; To borrow Money on the credit of the United States; To regulate Commerce with
foreign Nations, and among the several States, and with the Indian Tribes; To establish an uniform Rule of
Naturalization, and uniform Laws on the subject of Bankruptcies throughout the United States; To coin Money, regulate
the Value thereof, and of foreign Coin, and fix the Standard of Weights and Measures."""


def write_real(out: pathlib.Path, gguf: pathlib.Path) -> None:
    """Writes the real model's folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dequantized = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # Transformers refuses to save a model that was loaded from quantised weights.
    config = transformers.Gemma3TextConfig(**dequantized.config.to_dict())
    del config.quantization_config
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.load_state_dict(dequantized.state_dict())
    folder = out / "gemma3_270m"
    model.save_pretrained(folder, max_shard_size="400MB")
    tokenizer.save_pretrained(folder)
    tokens = np.array([2, *tokenizer.encode(TEXT, add_special_tokens=False)])
    arrays = {"text": np.array(TEXT), "tokens": tokens.astype(np.int32)}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for key, value in run(
            model.to(dtype), tokens[None], np.ones((1, tokens.size)), (5, 9, 12, 15)
        ).items():
            if key != "logits":
                arrays[f"{name}/{key}"] = value[0].astype(np.float32)
                continue
            log_p = torch.log_softmax(torch.tensor(value[0, :-1]).double(), dim=-1).numpy()
            arrays[f"{name}/loss"] = -log_p[np.arange(tokens.size - 1), tokens[1:]]
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    write_small(pathlib.Path(sys.argv[1]))
    if len(sys.argv) > 2:
        write_real(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
