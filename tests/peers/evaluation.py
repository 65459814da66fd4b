"""Evaluates our SAE on our evaluated rows, with SAELens and with our definitions in plain torch.

    python tests/peers/evaluation.py PEERS

Reads PEERS/evaluation, written by tests/peers_evaluation.py, and Gemma in PEERS/gemma3_270m, written by
tests/peers/hugging_face.py. Writes PEERS/evaluation/saelens.json. Does not import our package.
"""

import json
import os
import pathlib
import sys

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PEERS = pathlib.Path(sys.argv[1]).absolute()
FOLDER = PEERS / "evaluation"
PER_BATCH = 2
BOS = 2


def rows() -> torch.Tensor:
    with np.load(FOLDER / "rows.npz") as arrays:
        return torch.from_numpy(arrays["tokens"]).long()


def find_models_here() -> None:
    """Makes `google/gemma-3-270m`, the model named in our file, a relative path to the local weights."""
    place = PEERS / "hub" / "google" / "gemma-3-270m"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(PEERS / "gemma3_270m")
    os.chdir(PEERS / "hub")


def by_saelens(sae: torch.nn.Module, model: torch.nn.Module, spares_bos: bool = True) -> dict[str, float]:
    """All metrics of SAELens' evaluation on all rows; without the losses and KL if BOS is included."""
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    tokens = rows()
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(model, sae, dataset, streaming=False, total_tokens=len(tokens))
    batches = len(tokens) // PER_BATCH
    config = get_eval_everything_config(PER_BATCH, batches, batches)
    config.compute_ce_loss = config.compute_kl = spares_bos
    scalars, features = run_evals(
        sae, store, model, ActivationScaler(), config, exclude_special_tokens=spares_bos
    )
    found = {name: value for group in scalars.values() for name, value in group.items()}
    density = np.array(features["feature_density"], np.float32)
    return {
        **found,
        "never_fired": float((density == 0).mean()),
        "dense": float((density > np.float32(0.1)).mean()),
    }


def by_our_definitions(model: torch.nn.Module, sae: torch.nn.Module, layer: int) -> dict[str, float]:
    """The metrics of docs/metrics.md in plain torch, at the output of a block of transformers' model.

    The names `…|SAELens` and `…|SAEBench` are these tools' metrics by their own definitions.
    """
    from safetensors.numpy import load_file

    mean_O = torch.from_numpy(load_file(FOLDER / "sae" / "site_mean.safetensors")["site_mean"])
    block = model.model.layers[layer]
    sums: dict[str, float] = {}
    of_x = []  # The counted activations, for metrics that need all of them at once.
    errors = []
    fired_M = torch.zeros(sae.cfg.d_sae)

    def forward(tokens_SxL: torch.Tensor, replace: object) -> torch.Tensor:
        """The logits if `replace` changes the block's output."""

        def hook(module: object, args: object, output: object) -> object:
            if isinstance(output, tuple):
                return replace(output[0]), *output[1:]
            return replace(output)

        handle = block.register_forward_hook(hook)
        try:
            return model(input_ids=tokens_SxL).logits
        finally:
            handle.remove()

    def add(name: str, value: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(value.double().sum())

    for tokens_SxL in rows().split(PER_BATCH):
        kept_SxL = tokens_SxL != BOS  # The rows have no EOS and no PAD.
        scored_SxL = kept_SxL.clone()
        scored_SxL[:, -1] = False
        target_SxL = tokens_SxL.roll(-1, 1)
        seen = {}

        def read(value: torch.Tensor, seen: dict = seen) -> torch.Tensor:
            seen["x"] = value.detach().clone().requires_grad_()
            return seen["x"]

        def loss(logits: torch.Tensor, target_SxL: torch.Tensor = target_SxL) -> torch.Tensor:
            flat = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target_SxL.flatten(), reduction="none"
            )
            return flat.reshape(target_SxL.shape)

        clean = forward(tokens_SxL, read)
        chosen_SxL = clean.gather(-1, target_SxL[..., None])[..., 0] - clean.mean(-1)
        (gradient_SxLxO,) = torch.autograd.grad(chosen_SxL[scored_SxL].sum(), seen["x"])
        with torch.no_grad():
            clean = clean.detach()
            x = seen["x"].detach()
            f = sae.encode(x)
            y = sae.decode(f)
            add("n", kept_SxL)
            add("scored", scored_SxL)
            add("clean_loss", loss(clean)[scored_SxL])

            for name, replacement, where in (
                ("spliced", y, kept_SxL),
                ("zero", torch.zeros_like(x), kept_SxL),
                ("mean", mean_O.expand_as(x), kept_SxL),
                ("zero, BOS too", torch.zeros_like(x), torch.ones_like(kept_SxL)),
            ):
                logits = forward(
                    tokens_SxL, lambda v, r=replacement, w=where: torch.where(w[..., None], r, v)
                )
                add(f"{name}_loss", loss(logits)[scored_SxL])
                if name == "spliced":
                    p, q = (torch.log_softmax(value, -1) for value in (clean, logits))
                    kl_SxL = (p.exp() * (p - q)).sum(-1)
                    add("kl", kl_SxL[scored_SxL])
                    add("kl, last too", kl_SxL[kept_SxL])

            x, y, f, gradient = (value[kept_SxL] for value in (x, y, f, gradient_SxLxO))
            error_B = (x - y).square().sum(-1)
            add("l0", (f > 0).sum(-1))
            add("error", error_B)
            add("explained_variance_tokens", 1 - error_B / (x - mean_O).square().sum(-1))
            add("explained variance, batch's mean", 1 - error_B / (x - x.mean(0)).square().sum(-1))
            add("cosine", torch.nn.functional.cosine_similarity(x, y, dim=-1))
            add("norm_ratio", y.norm(dim=-1) / x.norm(dim=-1))
            fired_M += (f > 0).sum(0)
            of_x.append(x.double())
            errors.append((x - y).double())
            matters_BxM = (f * (gradient @ sae.W_dec.T)).abs().double()
            p_BxM = matters_BxM / matters_BxM.sum(-1, keepdim=True).clamp(min=1e-300)
            entropy_B = -torch.xlogy(p_BxM, p_BxM).sum(-1)
            count_B = (matters_BxM > 0).sum(-1)
            add("r_l0", (entropy_B.exp() / count_B.clamp(min=1))[count_B > 0])
            add("active", count_B > 0)

    x, error = torch.cat(of_x), torch.cat(errors)
    centred = (x - x.mean(0)).square()
    n, scored = sums["n"], sums["scored"]
    losses = {name: sums[f"{name}_loss"] / scored for name in ("clean", "spliced", "zero", "mean")}
    above = losses["spliced"] - losses["clean"]
    varies = centred.sum(0) > 0
    return {
        "l0": sums["l0"] / n,
        "fvu": float(error.square().sum() / centred.sum()),
        "fvu_per_dimension": float((error.square().sum(0) / centred.sum(0))[varies].mean()),
        "explained_variance_elements": float(1 - error.square().mean() / (x - x.mean()).square().mean()),
        **{name: sums[name] / n for name in ("explained_variance_tokens", "cosine", "norm_ratio")},
        "delta_loss": above,
        "clean_loss": losses["clean"],
        "spliced_loss": losses["spliced"],
        "zero_ablation_loss": losses["zero"],
        "mean_ablation_loss": losses["mean"],
        "loss_recovered_zero": 1 - above / (losses["zero"] - losses["clean"]),
        "loss_recovered_mean": 1 - above / (losses["mean"] - losses["clean"]),
        "kl": sums["kl"] / scored,
        "r_l0": sums["r_l0"] / sums["active"],
        "dead_fraction": float((fired_M == 0).float().mean()),
        "dense_fraction": float((fired_M / n > 0.1).float().mean()),
        "activations": n,
        "tokens": scored,
        "mse|SAELens": sums["error"] / n,
        "ce_loss_with_ablation|SAELens": sums["zero, BOS too_loss"] / scored,
        "kl_div_with_sae|SAELens": sums["kl, last too"] / n,
        "explained_variance_legacy|SAELens": sums["explained variance, batch's mean"] / n,
        # SAEBench's formula has the squared mean square of an element instead of the squared norm of the mean.
        "explained_variance|SAEBench": float(
            1 - sums["error"] / n / (x.square().sum(-1).mean() - x.square().mean() ** 2)
        ),
    }


def main() -> None:
    find_models_here()
    from sae_lens import SAE
    from sae_lens.load_model import load_model

    found = {}
    sae = SAE.load_from_disk(FOLDER / "sae")
    told = sae.cfg.metadata
    # TransformerLens' model and hook, as named in the file.
    model = load_model(told.model_class_name, told.model_name, "cpu", told.model_from_pretrained_kwargs)
    found["TransformerLens"] = by_saelens(sae, model)
    found["TransformerLens, BOS too"] = by_saelens(sae, model, spares_bos=False)
    del model
    # With transformers' model, the hook is the name of a module.
    layer = int(told.hook_name.split(".")[1])
    told.model_class_name, told.hook_name = "AutoModelForCausalLM", f"model.layers.{layer}"
    model = load_model(told.model_class_name, told.model_name, "cpu", hook_names=[told.hook_name])
    found["transformers"] = by_saelens(sae, model)
    found["torch"] = by_our_definitions(model.model, sae, layer)
    (FOLDER / "saelens.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
