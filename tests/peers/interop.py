"""Reads our files with other tools and writes files of theirs; tests/saes/interop_test.py compares the results.

    python tests/peers/interop.py FOLDER

Reads FOLDER/ours and FOLDER/activations.npz, written by tests/interop.py. Writes FOLDER/read.npz, the outputs of our
SAEs in each tool that loads them; FOLDER/theirs, SAEs saved by the tools; and theirs.npz, the outputs of those SAEs.
Does not import our package.
"""

import json
import os
import pathlib
import shutil
import sys
import types

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# dictionary_learning and circuit-tracer import nnsight for models that are not needed here.
nnsight = types.ModuleType("nnsight")
nnsight.LanguageModel = object
sys.modules["nnsight"] = nnsight

FOLDER = pathlib.Path(sys.argv[1])
OURS, THEIRS = FOLDER / "ours", FOLDER / "theirs"
HEADS = 8


def activations() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "activations.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def on_our_disk(*modules: object) -> None:
    """Makes loaders read a repository's files from ours/hub."""

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: object) -> str:
        return str(OURS / "hub" / repo_id / (subfolder or "") / filename)

    for module in modules:
        module.hf_hub_download = download


def circuit_tracer_module() -> types.ModuleType:
    """The transcoders of circuit-tracer, without the package's imports for graphs."""

    site = pathlib.Path(np.__file__).parents[1] / "circuit_tracer"
    for name, path in (("circuit_tracer", site), ("circuit_tracer.transcoder", site / "transcoder")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    utils = types.ModuleType("circuit_tracer.utils")
    utils.__path__ = [str(site / "utils")]
    utils.get_default_device = lambda: torch.device("cpu")
    sys.modules["circuit_tracer.utils"] = utils
    import circuit_tracer.transcoder.single_layer_transcoder as module

    return module


def read_saelens(x: dict[str, torch.Tensor], found: dict[str, np.ndarray]) -> None:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    on_our_disk(loaders)
    loaders.get_safetensors_tensor_shapes = lambda repo_id, filename, **_: _shapes(
        OURS / "hub" / repo_id / filename
    )

    def keep(name: str, sae: torch.nn.Module, value: torch.Tensor, has_heads: bool = False) -> None:
        if has_heads:
            value = value.reshape(len(value), HEADS, -1)
        with torch.no_grad():
            found[f"{name}|f"] = sae.encode(value).numpy()
            found[f"{name}|y"] = sae(value).reshape(len(value), -1).numpy()

    for path in sorted((OURS / "saelens").iterdir()):
        kind = path.name
        keep(
            f"{kind}|SAELens folder",
            SAE.load_from_disk(path),
            x[kind.removesuffix("_bfloat16")],
            kind.startswith("attention"),
        )

    def of_hub(
        kind: str, label: str, loader: object, repo: str, folder: str, has_heads: bool = False
    ) -> None:
        d, m = 48, 128
        overrides = {"device": "cpu", "d_in": d, "d_sae": m}
        if "transcoder" in kind or "skip" in kind:
            overrides["d_out"] = d
        config, tensors, _ = loader(repo, folder, "cpu", cfg_overrides=overrides)
        config = loaders.handle_config_defaulting(config)
        from sae_lens.registry import get_sae_class

        cls, config_cls = get_sae_class(config["architecture"])
        sae = cls(config_cls.from_dict(config))
        sae.load_state_dict(tensors)
        keep(f"{kind}|{label}", sae, x[kind], has_heads)

    first = loaders.gemma_2_sae_huggingface_loader
    place = "layer_12/width_16k/average_l0_7"
    of_hub("sae", "SAELens, npz", first, "google/gemma-scope-2b-pt-res", place)
    of_hub("attention", "SAELens, npz", first, "google/gemma-scope-2b-pt-att", place, True)
    transcoders = loaders.gemma_2_transcoder_huggingface_loader
    of_hub("transcoder", "SAELens, npz", transcoders, "google/gemma-scope-2b-pt-transcoders", place)
    second, repo = loaders.gemma_3_sae_huggingface_loader, "google/gemma-scope-2-1b-pt"
    of_hub("sae", "SAELens, Gemma Scope 2", second, repo, "resid_post/layer_12_width_16k_l0_medium")
    of_hub("attention", "SAELens, Gemma Scope 2", second, repo, "attn_out/layer_12_width_16k_l0_medium")
    of_hub("transcoder", "SAELens, Gemma Scope 2", second, repo, "transcoder/layer_12_width_16k_l0_medium")
    of_hub("skip", "SAELens, Gemma Scope 2", second, repo, "transcoder/layer_12_width_16k_l0_medium_affine")


def _shapes(path: pathlib.Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def read_others(x: dict[str, torch.Tensor], found: dict[str, np.ndarray]) -> None:
    from dictionary_learning.dictionary import JumpReluAutoEncoder

    def keep(name: str, sae: torch.nn.Module, value: torch.Tensor) -> None:
        with torch.no_grad():
            f = sae.encode(value)
            found[f"{name}|f"] = f.numpy()
            found[f"{name}|y"] = sae(value).numpy()

    for kind in ("sae", "attention"):
        path = OURS / "dictionary_learning" / kind / "ae.pt"
        keep(f"{kind}|dictionary_learning", JumpReluAutoEncoder.from_pretrained(str(path)), x[kind])

    from sae_bench.custom_saes import jumprelu_sae as bench

    def local(repo_id: str, filename: str, local_dir: str = "", **_: object) -> str:
        return str(OURS / "hub" / repo_id / filename)

    bench.hf_hub_download = local
    repo, place = "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_7/params.npz"
    sae = bench.load_gemma_scope_jumprelu_sae(repo, place, 12, "google/gemma-2-2b", "cpu", torch.float32)
    keep("sae|SAEBench, npz", sae, x["sae"])
    bench.hf_hub_download = lambda repo_id, filename, **_: str(OURS / repo_id / filename)
    sae = bench.load_dictionary_learning_jump_relu_sae(
        "dictionary_learning",
        "sae/ae.pt",
        "google/gemma-2-2b",
        "cpu",
        torch.float32,
        layer=12,
        local_dir=str(OURS / "dictionary_learning"),
    )
    keep("sae|SAEBench, dictionary_learning", sae, x["sae"])

    tracer = circuit_tracer_module()
    hub = OURS / "hub" / "google"

    def trace(kind: str, label: str, sae: torch.nn.Module) -> None:
        with torch.no_grad():
            found[f"{kind}|{label}|f"] = sae.encode(x[kind]).numpy()
            found[f"{kind}|{label}|y"] = sae(x[kind]).numpy()

    npz = hub / "gemma-scope-2b-pt-transcoders" / "layer_12/width_16k/average_l0_7/params.npz"
    trace(
        "transcoder",
        "circuit-tracer, npz",
        tracer.load_gemma_scope_transcoder(str(npz), 12, torch.device("cpu")),
    )
    for kind, affine in (("transcoder", ""), ("skip", "_affine")):
        path = hub / f"gemma-scope-2-1b-pt/transcoder/layer_12_width_16k_l0_medium{affine}/params.safetensors"
        loaded = tracer.load_gemma_scope_2_transcoder(str(path), 12, torch.device("cpu"))
        trace(kind, "circuit-tracer, Gemma Scope 2", loaded)
        # A set of transcoders for all layers; ours has the same transcoder in two layers.
        import yaml

        folder = OURS / "circuit_tracer" / kind
        config = yaml.safe_load((folder / "config.yaml").read_text())
        paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(2)}
        loaded = tracer.load_transcoder_set(
            paths, "ours", config["feature_input_hook"], config["feature_output_hook"], torch.device("cpu")
        )
        trace(kind, "circuit-tracer, its own", loaded.transcoders[1])


def write_saelens(x: dict[str, torch.Tensor], made: dict[str, np.ndarray]) -> None:
    import sae_lens
    from sae_lens import LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import jumprelu_sae, transcoder
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)

    def metadata(hook: str, out: str | None = None) -> SAEMetadata:
        extra = {"hook_name_out": out} if out else {}
        return SAEMetadata(
            model_name="gemma-2-2b", hook_name=hook, prepend_bos=True, context_size=128, **extra
        )

    def save(name: str, sae: torch.nn.Module, value: torch.Tensor) -> None:
        for key, parameter in sae.named_parameters():
            if key == "threshold":
                parameter.data = torch.rand_like(parameter) * 0.3
            elif key.startswith("b_"):
                parameter.data = torch.randn_like(parameter) * 0.1
            elif key == "W_skip":
                parameter.data = torch.randn_like(parameter) * 0.2
        sae.save_model(THEIRS / name)
        keep(name, sae, value)

    def keep(name: str, sae: torch.nn.Module, value: torch.Tensor) -> None:
        with torch.no_grad():
            made[f"{name}|f"] = sae.encode(value).numpy()
            made[f"{name}|y"] = sae(value).reshape(len(value), -1).numpy()

    fields = {"d_in": 48, "d_sae": 128, "dtype": "float32", "device": "cpu"}
    residual = metadata("blocks.12.hook_resid_post")
    for name, subtracts in (("saelens_sae", False), ("saelens_sae_subtracting_b_dec", True)):
        config = jumprelu_sae.JumpReLUSAEConfig(**fields, apply_b_dec_to_input=subtracts, metadata=residual)
        save(name, jumprelu_sae.JumpReLUSAE(config), x["sae"])
    config = jumprelu_sae.JumpReLUSAEConfig(
        **fields, reshape_activations="hook_z", metadata=metadata("blocks.12.attn.hook_z")
    )
    save(
        "saelens_attention", jumprelu_sae.JumpReLUSAE(config), x["attention"].reshape(-1, HEADS, 48 // HEADS)
    )
    mlp = metadata("blocks.12.ln2.hook_normalized", "blocks.12.hook_mlp_out")
    for name, cls, config_cls in (
        ("saelens_transcoder", transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig),
        ("saelens_skip", transcoder.JumpReLUSkipTranscoder, transcoder.JumpReLUSkipTranscoderConfig),
    ):
        config = config_cls(**fields, d_out=48, apply_b_dec_to_input=False, metadata=mlp)
        save(name, cls(config), x["transcoder"])

    # An SAE trained by SAELens.
    config = sae_lens.JumpReLUTrainingSAEConfig(
        d_in=48, d_sae=128, l0_coefficient=0.1, jumprelu_bandwidth=0.1, jumprelu_init_threshold=0.05,
        normalize_activations="none", metadata=residual, dtype="float32", device="cpu",
    )  # fmt: skip
    sae = sae_lens.JumpReLUTrainingSAE(config)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=1000 * 200, train_batch_size_samples=1000, lr=3e-3, lr_end=3e-3,
            adam_beta1=0.0, adam_beta2=0.999, logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )  # fmt: skip
    for _ in range(200):
        trainer.step(x["sae"])
        trainer.n_training_steps += 1
    sae.save_inference_model(THEIRS / "saelens_trained")
    keep("saelens_trained", sae_lens.SAE.load_from_disk(THEIRS / "saelens_trained"), x["sae"])


def write_others(x: dict[str, torch.Tensor], made: dict[str, np.ndarray]) -> None:
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    trainer = JumpReluTrainer(
        steps=100, activation_dim=48, dict_size=128, layer=12, lm_name="google/gemma-2-2b", lr=1e-3, bandwidth=0.1,
        sparsity_penalty=0.1, warmup_steps=10, sparsity_warmup_steps=10, target_l0=20.0, device="cpu",
        submodule_name="resid_post_layer_12",
    )  # fmt: skip
    for step in range(100):
        trainer.update(step, x["sae"])
    folder = THEIRS / "dictionary_learning"
    folder.mkdir()
    torch.save({name: value.cpu() for name, value in trainer.ae.state_dict().items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {"ctx_len": 128}}))
    with torch.no_grad():
        made["dictionary_learning|f"] = trainer.ae.encode(x["sae"]).numpy()
        made["dictionary_learning|y"] = trainer.ae(x["sae"]).numpy()

    tracer = circuit_tracer_module()
    from circuit_tracer.transcoder.activation_functions import JumpReLU

    for name, skips in (("circuit_tracer", False), ("circuit_tracer_skip", True)):
        folder = THEIRS / name
        folder.mkdir()
        config = "model_kind: transcoder_set\nmodel_name: google/gemma-2-2b\n"
        hooks = "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
        (folder / "config.yaml").write_text(config + hooks)
        for layer in range(2):
            made_here = tracer.SingleLayerTranscoder(
                48, 128, JumpReLU(torch.rand(128) * 0.3, 0.1), layer, skip_connection=skips,
                device=torch.device("cpu"), dtype=torch.float32,
            )  # fmt: skip
            for key, parameter in made_here.named_parameters():
                if "threshold" not in key:
                    parameter.data = torch.randn_like(parameter) * 0.2
            from safetensors.torch import save_file

            save_file(made_here.state_dict(), folder / f"layer_{layer}.safetensors")
            with torch.no_grad():
                f, y = made_here.encode(x["transcoder"]), made_here(x["transcoder"])
            made[f"{name}/{layer}|f"], made[f"{name}/{layer}|y"] = f.numpy(), y.numpy()


def main() -> None:
    x = activations()
    shutil.rmtree(THEIRS, ignore_errors=True)
    THEIRS.mkdir()
    found: dict[str, np.ndarray] = {}
    read_saelens(x, found)
    read_others(x, found)
    np.savez(FOLDER / "read.npz", **found)
    made: dict[str, np.ndarray] = {}
    write_saelens(x, made)
    write_others(x, made)
    np.savez(FOLDER / "theirs.npz", **made)


if __name__ == "__main__":
    main()
