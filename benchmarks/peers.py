"""The time of the same SAE update in SAELens and dictionary_learning, with torch.

    make benchmark-peers

Runs in a separate environment with torch, sae-lens and dictionary-learning, and imports nothing of this project.
Sizes, data and method are the same as in `benchmarks/step.py`. Prints a JSON object.
"""

import json
import sys
import time
import types

import torch

# dictionary_learning imports nnsight only for type hints.
sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object

from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig

B, D, M, L0 = 1024, 640, 4096, 60


def least_time(fn, repeat=8):
    fn()
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - start)
    return best


def five_matmuls():
    x, f, w_dm, w_md = torch.randn(B, D), torch.randn(B, M), torch.randn(D, M), torch.randn(M, D)
    to_latents = min(least_time(lambda: x @ w_dm), least_time(lambda: x @ w_md.T))
    to_site = min(least_time(lambda: f @ w_md), least_time(lambda: f @ w_dm.T))
    weights = min(least_time(lambda: f.T @ x), least_time(lambda: x.T @ f))
    return 2 * to_latents + to_site + 2 * weights


def threshold_for_l0(w_enc, x):
    return torch.quantile((x @ w_enc)[:, :512].flatten()[:1_000_000], 1 - L0 / M).item()


def sae_lens_update(x):
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D, d_sae=M, decoder_init_norm=1.0, jumprelu_bandwidth=0.04, l0_coefficient=5e-4,
            l0_warm_up_steps=10_000, normalize_activations="none", apply_b_dec_to_input=True,
        )
    )  # fmt: skip
    sae.threshold.data[:] = threshold_for_l0(sae.W_enc.data, x)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=B * 100_000, train_batch_size_samples=B, lr=1e-12, lr_end=1e-12,
            lr_warm_up_steps=0, adam_beta1=0.0, adam_beta2=0.999, logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )  # fmt: skip

    def update():
        trainer.step(x)
        trainer.n_training_steps += 1

    return update


def dictionary_learning_update(x):
    trainer = JumpReluTrainer(
        steps=100_000, activation_dim=D, dict_size=M, layer=0, lm_name="none", lr=1e-12, bandwidth=0.04,
        sparsity_penalty=1.0, warmup_steps=0, sparsity_warmup_steps=10_000, target_l0=float(L0), device="cpu",
    )  # fmt: skip
    trainer.ae.threshold.data[:] = threshold_for_l0(trainer.ae.W_enc.data, x)
    counter = iter(range(1, 100_000))
    return lambda: trainer.update(next(counter), x)


def main():
    torch.manual_seed(0)
    x = torch.randn(B, D) / D**0.5
    floor = five_matmuls()
    numbers = {"five_matmuls_ms": 1e3 * floor, "threads": torch.get_num_threads()}
    for name, make in (("sae_lens", sae_lens_update), ("dictionary_learning", dictionary_learning_update)):
        seconds = least_time(make(x))
        numbers[f"{name}_ms"] = 1e3 * seconds
        numbers[f"{name}_over_five_matmuls"] = seconds / floor
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
