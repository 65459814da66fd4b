"""Trains the same SAEs with float32 products and with the bfloat16 passes of a TPU, and compares them.

    python -m benchmarks.ablation PART [--folder=runs/ablation]

Parts:
  harvest  the quickstart's activations, harvested once; the other parts train on them
  core     4,096 latents, six λ, five seeds: float32, one pass, and float32 on inputs that are off by one ulp
  wide     16,384 latents, two λ, three seeds: the same, and three passes, and one pass except in the encoder

All arms see the same activations in the same order, a permutation by seed. Runs amplify any difference, however
small: the arm whose inputs are off by one ulp shows how far two equal runs drift apart. Each trained bank and its
numbers are stored in files, so an interrupted part continues after the last of them.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart, quickstart_banks
from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.evaluation import evaluate
from gemma_scope_jax.models import placement
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import files
from gemma_scope_jax.saes import attached, jumprelu
from gemma_scope_jax.saes.products import Precision, matmul
from gemma_scope_jax.training import bank, loop, normalizer, runs, shuffle_buffer, step

SWEEP = quickstart_banks.get_config("sweep").banks.residual.sparsity_coefficients
HELD_OUT_ROWS = 32

FLOAT32 = "float32"
ARMS = {
    FLOAT32: Precision(),
    "one_ulp": Precision(),
    "one_pass": Precision.of("emulated_default"),
    "three_passes": Precision.of("emulated_high"),
    "one_pass_but_encoder": dataclasses.replace(Precision.of("emulated_default"), encode="highest"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """SAEs to train, once for each arm and seed."""

    width: int
    lambdas: tuple[float, ...]
    seeds: int
    arms: tuple[str, ...]


PARTS = {
    "core": Part(4096, SWEEP, 5, (FLOAT32, "one_pass", "one_ulp")),
    "wide": Part(
        16384, (5e-4, 2e-3), 3, (FLOAT32, "one_pass", "one_ulp", "three_passes", "one_pass_but_encoder")
    ),
}


def run_of(part: Part, seed: int) -> runs.Run:
    """The quickstart's run with the SAEs of a part."""
    c = quickstart.get_config()
    c.gemma_dtype = "float32"  # Only the products of the SAEs differ.
    c.banks.main.width = part.width
    c.banks.main.sparsity_coefficients = part.lambdas
    c.banks.main.seeds = (seed,)
    return runs.build(config_lib.from_dict(c.to_dict()))


def harvest(folder: pathlib.Path) -> None:
    """Writes the quickstart's normalised activations, their weights, and the normaliser."""
    run = run_of(PARTS["core"], 0)
    (site,) = run.plan.sites
    rows = token_rows.open_rows(prepare.rows_of(run.config), token_rows.TRAIN)
    gemma = runs.load_gemma(run)
    normalizers = loop.calibrate(run, rows, gemma, run.plan.sites)
    of_batch = jax.jit(
        lambda gemma, batch: step.leave_out(step.harvest(gemma, batch, normalizers, run.plan.sites, 1))[0]
    )
    acts, weights = [], []
    for number in range(run.plan.harvests):
        count = run.config.train.sequences_per_step
        slots = of_batch(gemma, runs.read_batch(run, rows, number * count, count))
        acts.append(np.asarray(slots.acts[str(site)]).reshape(run.plan.activations, -1))
        weights.append(np.asarray(slots.weight[str(site)]).reshape(-1))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "normalizer.npz", **vars(normalizers[str(site)]))
    np.save(folder / "weight_N.npy", np.concatenate(weights))
    with files.replacing_file(folder / "x_NxD.npy") as path, path.open("wb") as file:
        np.save(file, np.concatenate(acts))


def train(run: runs.Run, folder: pathlib.Path, arm: str, seed: int) -> bank.State:
    """Trains the bank of a run on the harvested activations."""
    (site,) = map(str, run.plan.sites)
    (bank_plan,) = run.plan.banks
    plan = dataclasses.replace(
        run.plan,
        banks=(dataclasses.replace(bank_plan, precision=ARMS[arm]),),
        ring_capacity=run.plan.activations,
    )
    x_NxD, weight_N = np.load(folder / "x_NxD.npy", mmap_mode="r"), np.load(folder / "weight_N.npy")
    state = step.init_state(plan, {site: read_normalizer(folder)}, jnp.float32)
    update = jax.jit(
        lambda state, batches: state.replace(
            step=state.step + 1, banks=step.train(plan, run.mesh, state, batches)[0]
        ),
        donate_argnums=0,
    )
    order = np.random.default_rng(seed).permutation(len(weight_N))
    shape = (plan.updates_per_step, plan.batch)
    for number in range(plan.harvests):
        chosen = order[number * plan.activations : (number + 1) * plan.activations]
        x = x_NxD[np.sort(chosen)][np.argsort(np.argsort(chosen))]
        if arm == "one_ulp":
            x = np.nextafter(x, np.float32(np.inf))
        batches = shuffle_buffer.Slots(
            {site: jnp.asarray(x.reshape(*shape, -1))},
            {site: jnp.asarray(weight_N[chosen].reshape(shape))},
            jnp.zeros((*shape, 3), jnp.int32),
        )
        state = update(state, batches)
    return jax.block_until_ready(state.banks[bank_plan.name])


def read_normalizer(folder: pathlib.Path) -> normalizer.Normalizer:
    """The normaliser that `harvest` wrote."""
    return normalizer.Normalizer(**{k: jnp.asarray(v) for k, v in np.load(folder / "normalizer.npz").items()})


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The model, the rows and the activations that all SAEs are measured on."""

    gemma: Gemma
    training_rows: token_rows.Rows
    rows: token_rows.Rows
    x_BxD: np.ndarray  # the activations of the held-out rows


def held_out(run: runs.Run) -> HeldOut:
    """Loads Gemma in float32, and reads the held-out rows and their activations."""
    gemma = placement.load(run.config.model, run.config.weights, jnp.float32)
    folder = prepare.rows_of(run.config)
    training, rows = (
        token_rows.open_rows(folder, split) for split in (token_rows.TRAIN, token_rows.HELD_OUT)
    )
    found = evaluate.activations(gemma, run.plan.sites, rows, HELD_OUT_ROWS, 8)
    return HeldOut(gemma, training, rows, found[run.plan.sites[0]])


def measure(
    run: runs.Run, params: jumprelu.Params, of: normalizer.Normalizer, arm: str, on: HeldOut
) -> list[dict]:
    """Numbers of each SAE: folded and at full precision; and in its training form at its own precision."""
    (plan,), (site,) = run.plan.banks, run.plan.sites
    mean_O = np.asarray(of.ablation_mean_D)
    subjects = {
        member.name: attached.Subject(bank.fold(plan, params, {str(site): of}, place), site, mean_O)
        for place, member in enumerate(plan.members)
    }
    evaluated, _ = evaluate.evaluate(
        on.gemma, subjects, on.training_rows, on.rows, HELD_OUT_ROWS, 8, is_fast=True
    )
    keys = ("l0", "fvu", "delta_loss", "delta_loss_se", "dead_fraction", "dense_fraction")
    made = []
    for place, member in enumerate(plan.members):
        own = jax.tree.map(lambda leaf, place=place: jnp.asarray(leaf[place]), params)
        made.append(
            {
                "lambda": member.sparsity_coefficient,
                "folded": {key: getattr(evaluated[member.name], key) for key in keys},
                "as_trained": as_trained(own, of, ARMS[arm], on.x_BxD),
                "at_full_precision": as_trained(own, of, Precision(), on.x_BxD),
                "threshold": float(jnp.exp(own.log_threshold).mean()),
            }
        )
    return made


def reconstruct(
    params: jumprelu.Params, x_BxD: jax.Array, precision: Precision
) -> tuple[jax.Array, jax.Array]:
    """Which latents fire [B, M] on normalised activations, and the reconstructions [B, D], as in training."""
    pre_BxM = matmul(x_BxD - params.b_dec[None], params.W_enc, precision.encode) + params.b_enc[None]
    active_BxM = pre_BxM > jnp.exp(params.log_threshold)[None]
    f_BxM = jnp.where(active_BxM, pre_BxM, 0)
    return active_BxM, matmul(f_BxM, params.W_dec, precision.decode) + params.b_dec[None]


def as_trained(
    params: jumprelu.Params, of: normalizer.Normalizer, precision: Precision, x_BxD: np.ndarray
) -> dict:
    """L0 and FVU of the training form on raw activations, and FVU of outliers and of other tokens apart."""
    x_BxD = (jnp.asarray(x_BxD) - of.mean_D[None]) / of.scale
    compiled = jax.jit(reconstruct, static_argnames="precision")
    l0, errors, flips = [], [], []
    for start in range(0, len(x_BxD), 2048):
        part = x_BxD[start : start + 2048]
        active, recon = compiled(params, part, precision)
        exact, _ = compiled(params, part, Precision())
        l0.append(active.sum(1))
        flips.append((active != exact).sum(1))
        errors.append(jnp.square(recon - part).sum(1))
    l0, error_B, flips = (np.concatenate(parts).astype(np.float64) for parts in (l0, errors, flips))
    distance_B = np.asarray(jnp.square(x_BxD - x_BxD.mean(0)[None]).sum(1), np.float64)
    outlier_B = np.asarray(jnp.square(x_BxD).sum(1) * of.scale**2 > of.max_squared_norm)
    return {
        "l0": l0.mean(),
        "fvu": error_B.sum() / distance_B.sum(),
        "fvu_of_outliers": error_B[outlier_B].sum() / distance_B[outlier_B].sum(),
        "fvu_of_others": error_B[~outlier_B].sum() / distance_B[~outlier_B].sum(),
        "outliers": int(outlier_B.sum()),
        "flips": flips.sum() / l0.sum(),  # against the same parameters at full precision
    }


def matches(a_MxO: np.ndarray, b_MxO: np.ndarray) -> float:
    """The share of decoder rows of `a`, of unit norm, that have a row of `b` with a cosine above 0.9."""
    return float(((a_MxO @ b_MxO.T).max(1) > 0.9).mean())


def summarise(name: str, folder: pathlib.Path) -> dict:
    """Differences of each arm of a part from float32, with the same seed and λ, over the part's seeds.

    Returns:
      By arm and number: the mean over seeds of the difference, itself a mean over λ, and its standard error. SAEs of
      one seed share their batches, so only seeds count as independent.
    """
    part = PARTS[name]

    def read(arm: str, seed: int) -> list[dict]:
        return json.loads((folder / name / f"{arm}_{seed}.json").read_text())

    def decoders(arm: str, seed: int) -> np.ndarray:
        return np.load(folder / name / f"{arm}_{seed}.npz")["W_dec"]

    arms = [arm for arm in part.arms if arm != FLOAT32]
    seeds = range(part.seeds)
    found: dict = {"lambdas": part.lambdas, "float32": [read(FLOAT32, s) for s in seeds]}
    for arm in arms:
        pairs = [(read(arm, seed), read(FLOAT32, seed)) for seed in seeds]
        of_arm = {}
        for form in ("folded", "as_trained"):
            for key in pairs[0][0][0][form]:
                change_SxN = np.array(
                    [[a[form][key] - b[form][key] for a, b in zip(*pair, strict=True)] for pair in pairs]
                )
                change_S = change_SxN.mean(1)
                of_arm[f"{form}.{key}"] = {
                    "mean": float(change_S.mean()),
                    "se": float(change_S.std(ddof=1) / np.sqrt(len(seeds))),
                    "by_lambda": change_SxN.mean(0).tolist(),
                }
        of_arm["matches"] = [
            [matches(a, b) for a, b in zip(decoders(arm, s), decoders(FLOAT32, s), strict=True)]
            for s in seeds
        ]
        found[arm] = of_arm
    found["matches_between_seeds"] = [
        [matches(a, b) for a, b in zip(decoders(FLOAT32, s), decoders(FLOAT32, seeds[0]), strict=True)]
        for s in seeds[1:]
    ]
    return found


def run_part(name: str, folder: pathlib.Path) -> None:
    """Trains and measures what is not there yet of a part, seed by seed."""
    part, on, of = PARTS[name], None, read_normalizer(folder)
    for seed in range(part.seeds):
        run = run_of(part, seed)
        for arm in part.arms:
            params_path = folder / name / f"{arm}_{seed}.npz"
            if not params_path.exists():
                start = time.monotonic()
                params = train(run, folder, arm, seed).params
                with files.replacing_file(params_path) as partial, partial.open("wb") as file:
                    np.savez(file, **{k: v for k, v in vars(params).items() if v is not None})
                print(f"{params_path}: trained in {time.monotonic() - start:.0f} s", flush=True)
        for arm in part.arms:
            path = folder / name / f"{arm}_{seed}.json"
            if not path.exists():
                start = time.monotonic()
                on = on or held_out(run)
                params = jumprelu.Params(**np.load(path.with_suffix(".npz")))
                files.write_text(path, json.dumps(measure(run, params, of, arm, on), indent=1))
                print(f"{path}: measured in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["harvest", *PARTS], help="the part to run")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/ablation"))
    args = parser.parse_args()
    if not (args.folder / "x_NxD.npy").exists():
        harvest(args.folder)
    if args.part != "harvest":
        run_part(args.part, args.folder)
        summary = json.dumps(summarise(args.part, args.folder), indent=1)
        files.write_text(args.folder / f"{args.part}.json", summary)


if __name__ == "__main__":
    main()
