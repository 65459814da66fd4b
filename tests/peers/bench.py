"""Evaluates our SAE with SAEBench: its interface checks, core evaluation and sparse probing.

    python tests/peers/bench.py PEERS

Reads PEERS/evaluation, written by tests/peers_evaluation.py, and Gemma in PEERS/gemma3_270m, written by
tests/peers/hugging_face.py. Writes PEERS/evaluation/bench.json. Does not import our package. The evaluations call the
same functions as SAEBench's commands. Their data are our evaluated rows for core, and speeches for probing.
"""

import dataclasses
import json
import os
import shutil

# Newer versions of beartype check the values of dicts, where the sizes in SAEBench's annotations are inconsistent.
os.environ["JAXTYPING_DISABLE"] = "1"

import evaluation
import torch
from evaluation import FOLDER, PEERS

MODEL = "google/gemma-3-270m"
CONTEXT = 64  # Tokens of a passage.


def interface(sae: torch.nn.Module) -> dict:
    """SAEBench's requirements on an SAE, with its own checks where it has them."""
    from sae_bench.custom_saes import base_sae, custom_sae_config
    from sae_bench.sae_bench_utils import general_utils

    # Every evaluation calls this first; it fills in cfg.
    _, same, _ = general_utils.load_and_format_sae("ours", sae, "cpu")
    assert same is sae
    # Raises if flat and stacked activations are decoded differently.
    base_sae.BaseSAE.test_sae(sae, MODEL)
    x = torch.randn(2, 5, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)) * 100
    with torch.no_grad():
        f = sae.encode(x)
        pairs = {
            "encode, flat": (sae.encode(x.flatten(0, 1)), f.flatten(0, 1)),
            "decode, flat": (sae.decode(f.flatten(0, 1)), sae.decode(f).flatten(0, 1)),
            "forward": (sae(x), sae.decode(f)),
            "forward, flat": (sae(x.flatten(0, 1)), sae(x).flatten(0, 1)),
        }
    fields = {field.name for field in dataclasses.fields(custom_sae_config.CustomSAEConfig)}
    wanted = fields | {"activation_fn_kwargs", "model_from_pretrained_kwargs", "architecture_str", "metadata"}

    def has(name: str) -> bool:
        return hasattr(sae.cfg, name) or hasattr(sae.cfg.metadata, name)

    return {
        "shapes": {name: list(getattr(sae, name).shape) for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
        "are_parameters": all(
            isinstance(getattr(sae, name), torch.nn.Parameter)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        ),
        "device": str(sae.device),
        "dtype": str(sae.dtype),
        "cfg": {
            name: getattr(sae.cfg, name)
            for name in ("model_name", "d_in", "d_sae", "hook_layer", "hook_name", "dtype", "prepend_bos")
        },
        "cfg_lacks": sorted(name for name in wanted if not has(name)),
        "cfg_is_json": bool(json.dumps(sae.cfg.to_dict())),
        "unit_rows": base_sae.BaseSAE.check_decoder_norms(sae)
        and general_utils.check_decoder_norms(sae.W_dec),
        "furthest_row": float((sae.W_dec.detach().norm(dim=1) - 1).abs().max()),
        "differences": {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()},
    }


def core(sae: torch.nn.Module, spares_bos: bool) -> dict[str, float]:
    """SAEBench's core evaluation on our rows. By default it splices at BOS too."""
    from sae_bench.evals.core import main
    from sae_lens.training import activations_store

    data, out = PEERS / "hub" / "held_out", FOLDER / "bench"
    data.mkdir(exist_ok=True)
    tokens = evaluation.rows()
    (data / "train.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in tokens.tolist()))
    # A tokenised data set on the hub names its tokenizer in this file.
    (data / "sae_lens.json").write_text(json.dumps({"tokenizer_name": MODEL}))
    activations_store.hf_hub_download = lambda repo_id, name, **_: str(PEERS / "hub" / repo_id / name)
    batches = len(tokens)
    (found,) = main.multiple_evals(
        [("ours", sae)],
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        eval_batch_size_prompts=1,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=spares_bos,
        dataset="held_out",
        context_size=tokens.shape[1],
        output_folder=str(out),
        device="cpu",
        force_rerun=True,
    )
    groups = found["metrics"].values()
    return {name: value for group in groups for name, value in group.items()}


def probing(sae: torch.nn.Module) -> dict[str, float]:
    """SAEBench's sparse probing for the period of a speech."""
    from sae_bench.evals.sparse_probing import main
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    speeches = json.loads((FOLDER / "speeches.json").read_text())
    times = list(speeches["learnt"])
    main.dataset_info.chosen_classes_per_dataset["speeches"] = times
    main.dataset_utils.get_multi_label_train_test_data = lambda *_: (speeches["learnt"], speeches["asked"])
    config = SparseProbingEvalConfig(
        dataset_names=["speeches"],
        context_length=CONTEXT,
        llm_batch_size=20,
        llm_dtype="float32",
        model_name=MODEL,
    )
    artifacts = FOLDER / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)  # Cached activations of an earlier model.
    results = main.run_eval(
        config, [("ours", sae)], "cpu", str(FOLDER / "bench_probing"), True, True, True, str(artifacts)
    )
    (found,) = results.values()
    metrics = found["eval_result_metrics"]
    return {k: v for part in ("llm", "sae") for k, v in metrics[part].items() if v is not None}


def main() -> None:
    evaluation.find_models_here()
    from sae_lens import SAE

    sae = SAE.load_from_disk(FOLDER / "sae")
    found = {"interface": interface(sae)}
    found["core, BOS spared"] = core(sae, True)
    found["core"] = core(sae, False)
    found["probing"] = probing(sae)
    (FOLDER / "bench.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
