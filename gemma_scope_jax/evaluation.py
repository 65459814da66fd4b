"""SAEs and transcoders in Gemma's place: what they make of its activations, and what that costs its predictions.

Every position but BOS, EOS and PAD (and the user prefix of the chat template) is spliced, and only predictions made
from such positions are scored. `metrics` has the numbers.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from gemma import gm
from jax.sharding import PartitionSpec as P

from gemma_scope_jax import data, gemma, hosts, metrics, sae, sharding, step, weights
from gemma_scope_jax.metrics import Evaluation

# The rows of a held-out split that are evaluated are the first of this order, whatever the run's seed.
ORDER_SEED = 0
MEAN_ROWS = 64  # On so many training rows a site's mean is measured where it is not known.


@dataclasses.dataclass(frozen=True)
class Subject:
    """An SAE to evaluate, on the site of its model; or a transcoder, which takes the place of its target site."""

    sae: sae.SAE
    site: gemma.Site
    mean_O: np.ndarray | None  # The target's mean for mean ablation; None: measured on training rows.
    target_site: gemma.Site | None = None  # Of a transcoder: what it predicts, at the same layer.

    @property
    def spliced(self) -> gemma.Site:
        """The site whose place is taken."""
        return self.target_site or self.site


def _whole(mesh: jax.sharding.Mesh, params: weights.Params) -> weights.Params:
    """Blocks whole on each chip, one after the other, and the embedding too, which here makes logits."""
    return {**step.gather_gemma(mesh, params), "embedder": sharding.constrain(mesh, params["embedder"], P())}


@functools.partial(jax.jit, static_argnames=("mesh", "model", "sites"))
def _clean(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    tokens_SxL: jax.Array,
    sites: tuple[gemma.Site, ...],
) -> tuple[dict[int, jax.Array], dict[gemma.Site, jax.Array], jax.Array]:
    """One forward pass: the streams before each site's block, the sites' activations, the stream behind the last."""
    params = step.gather_gemma(mesh, params)
    x_SxLxD = sharding.constrain(mesh, gemma.embed(model, params, tokens_SxL), sharding.TOKENS)
    before = {site.layer: gemma.Site("resid_post", site.layer - 1) for site in sites if site.layer}
    layers = range(model.config.num_layers)
    read = {*sites, *before.values()}
    final_SxLxD, values = gemma.run_blocks(model, params, x_SxLxD, tokens_SxL, layers, read=read)
    streams = {0: x_SxLxD, **{layer: values[site] for layer, site in before.items()}}
    return streams, {site: values[site] for site in sites}, final_SxLxD


@functools.partial(jax.jit, static_argnames=("mesh", "model", "site", "prefix"))
def _spliced(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    before_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    site: gemma.Site,
    replacement_SxLxD: jax.Array,
    prefix: int,
) -> jax.Array:
    """The residual stream behind the last block, with something else in the site's place."""
    is_kept_SxLx1 = gemma.is_kept(tokens_SxL, prefix)[..., None]

    def replace(x_SxLxD: jax.Array) -> jax.Array:
        return jnp.where(is_kept_SxLx1, replacement_SxLxD.astype(x_SxLxD.dtype), x_SxLxD)

    layers = range(site.layer, model.config.num_layers)
    params = step.gather_gemma(mesh, params)
    return gemma.run_blocks(model, params, before_SxLxD, tokens_SxL, layers, write={site: replace})[0]


# Apart from the blocks: XLA's CPU backend makes the two together slower than they are one after the other.
@functools.partial(jax.jit, static_argnames=("mesh", "model", "prefix"))
def _loss(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    final_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    prefix: int,
) -> dict[str, jax.Array]:
    """The loss of each prediction, 0 where it is not scored, and where it is."""
    params = _whole(mesh, params)
    loss_SxL, scored_SxL = gemma.next_token_loss(
        model, params, final_SxLxD, tokens_SxL, prefix, 64 * mesh.size
    )
    return sharding.constrain(mesh, {"loss_SxL": loss_SxL * scored_SxL, "scored_SxL": scored_SxL}, P())


@functools.partial(jax.jit, static_argnames=("mesh", "model", "prefix"))
def _divergence(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    final_SxLxD: jax.Array,
    clean_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    prefix: int,
) -> dict[str, jax.Array]:
    """The loss of each prediction and its divergence from the clean one, 0 where it is not scored."""
    params = _whole(mesh, params)
    found = gemma.next_token_divergence(model, params, final_SxLxD, clean_SxLxD, tokens_SxL, 64 * mesh.size)
    _, scored_SxL = gemma.next_tokens(tokens_SxL, prefix)
    loss_SxL, kl_SxL = (jnp.where(scored_SxL, value, 0) for value in found)
    return sharding.constrain(mesh, {"loss_SxL": loss_SxL, "kl_SxL": kl_SxL}, P())


@functools.partial(jax.jit, static_argnames=("mesh", "model", "site", "prefix"))
def _importance(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    before_SxLxD: jax.Array,
    value_SxLxO: jax.Array,
    tokens_SxL: jax.Array,
    site: gemma.Site,
    prefix: int,
) -> jax.Array:
    """The gradient [S, L, O], at the site's activations, of the sum of all scored centred logits of next tokens."""
    _, scored_SxL = gemma.next_tokens(tokens_SxL, prefix)
    layers = range(site.layer, model.config.num_layers)

    def total(value_SxLxO: jax.Array) -> jax.Array:
        gathered = _whole(mesh, params)
        write = {site: lambda _: value_SxLxO}
        final_SxLxD, _ = gemma.run_blocks(model, gathered, before_SxLxD, tokens_SxL, layers, write=write)
        logits_SxL = gemma.centred_logits(model, gathered, final_SxLxD, tokens_SxL, 64 * mesh.size)
        return jnp.where(scored_SxL, logits_SxL, 0).sum()

    return jax.grad(total)(value_SxLxO)


@functools.partial(jax.jit, static_argnames=("mesh", "prefix"))
def _reconstruct(
    mesh: jax.sharding.Mesh,
    subject: sae.SAE,
    x_SxLxD: jax.Array,
    y_SxLxO: jax.Array,
    mean_O: jax.Array,
    tokens_SxL: jax.Array,
    importance_SxLxO: jax.Array | None,
    prefix: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See `metrics.measure`; what is measured is whole on every chip."""
    is_kept_SxL = gemma.is_kept(tokens_SxL, prefix)
    recon_SxLxO, found = metrics.measure(subject, x_SxLxD, y_SxLxO, mean_O, is_kept_SxL, importance_SxLxO)
    return sharding.constrain(mesh, recon_SxLxO, sharding.TOKENS), sharding.constrain(mesh, found, P())


def _place(mesh: jax.sharding.Mesh, subject: sae.SAE) -> sae.SAE:
    """An SAE on the devices, its latents over all of them where they divide."""
    axes = ("data", "latent") if subject.b_enc.size % mesh.size == 0 else None
    specs = {"W_enc": P(None, axes), "b_enc": P(axes), "threshold": P(axes), "W_dec": P(axes, None)}

    def place(name: str, value: np.ndarray) -> jax.Array:
        placed = jax.NamedSharding(mesh, specs.get(name, P()))
        return jax.make_array_from_callback(value.shape, placed, lambda index: np.asarray(value[index]))

    named = {name: value for name, value in vars(subject).items() if value is not None}
    return sae.SAE(**{name: place(name, value) for name, value in named.items()})


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of tokens on the devices; the last of them may be padding."""

    tokens_SxL: jax.Array
    count: int  # that are none
    position_SxL: np.ndarray  # of the `count`, behind a document's BOS


def _batches(mesh: jax.sharding.Mesh, rows: data.Rows, count: int, per_batch: int) -> Iterator[Rows]:
    """The first rows in the order of `ORDER_SEED`, so many at a time, padded to as many as the devices divide."""
    chosen = data.order(len(rows), ORDER_SEED, 0, count)
    per_batch = -(-min(per_batch, count) // mesh.size) * mesh.size
    placed = jax.NamedSharding(mesh, sharding.TOKENS)
    for start in range(0, count, per_batch):
        tokens = np.asarray(rows.read(chosen[start : start + per_batch]).tokens)
        padded = np.pad(tokens, ((0, per_batch - len(tokens)), (0, 0)), constant_values=gemma.PAD)
        on_devices = jax.make_array_from_callback(
            padded.shape, placed, lambda index, padded=padded: padded[index]
        )
        yield Rows(on_devices, len(tokens), np.asarray(gemma.packed_positions(jnp.asarray(tokens))))


def site_means(
    loaded: gemma.Gemma,
    sites: tuple[gemma.Site, ...],
    rows: data.Rows,
    per_batch: int,
    prefix: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[gemma.Site, np.ndarray]:
    """The means of sites over the unmasked positions of the first training rows, all in the same passes."""
    mesh = mesh or one_device()
    totals, n = dict.fromkeys(sites, 0.0), 0

    @functools.partial(jax.jit, static_argnames="prefix")
    def sums(values: dict, tokens_SxL: jax.Array, prefix: int) -> dict:
        kept_SxL = gemma.is_kept(tokens_SxL, prefix)
        means = {
            site: (kept_SxL[..., None] * v.astype(jnp.float32)).sum((0, 1)) for site, v in values.items()
        }
        return sharding.constrain(mesh, (means, kept_SxL.sum()), P())

    for batch in _batches(mesh, rows, min(MEAN_ROWS, len(rows)), per_batch) if sites else ():
        _, values, _ = _clean(mesh, loaded.model, loaded.params, batch.tokens_SxL, sites)
        found, kept = hosts.fetch(sums(values, batch.tokens_SxL, prefix))
        totals = {site: totals[site] + np.asarray(found[site], np.float64) for site in sites}
        n += int(kept)
    return {site: (total / n).astype(np.float32) for site, total in totals.items()}


def one_device() -> jax.sharding.Mesh:
    """A mesh of the default device alone."""
    return sharding.make_mesh(1, 1, jax.devices()[:1])


def evaluate(
    loaded: gemma.Gemma,
    subjects: Mapping[str, Subject],
    training_rows: data.Rows,
    held_out_rows: data.Rows,
    count: int,
    per_batch: int,
    prefix: int = 0,
    is_fast: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Evaluation]:
    """Evaluates SAEs on the first `count` held-out rows in a fixed order.

    One forward pass gives all sites' activations and the clean predictions; from each spliced site's block on, one
    pass for zero and one for mean ablation, one gradient, and one pass for each SAE.

    Args:
      loaded: the whole model.
      subjects: the SAEs by name.
      training_rows: on which a site's mean is measured where it is not known.
      held_out_rows: what is evaluated on.
      count: how many of them, at most all.
      per_batch: rows in one pass.
      prefix: positions behind BOS that are neither spliced nor scored; see `gemma.is_kept`.
      is_fast: without KL, which makes logits twice, and r_L0, which needs the gradient.
      mesh: of the devices that `loaded` lies on; None: the default device.
    """
    mesh = mesh or one_device()
    count = min(count, len(held_out_rows))
    by_site: dict[gemma.Site, dict[str, Subject]] = {}
    for name, subject in subjects.items():
        by_site.setdefault(subject.spliced, {})[name] = subject
    known = {s.spliced: s.mean_O for s in subjects.values() if s.mean_O is not None}
    unknown = tuple(site for site in by_site if site not in known)
    means = known | site_means(loaded, unknown, training_rows, per_batch, prefix, mesh)
    sites = tuple(dict.fromkeys(s for subject in subjects.values() for s in (subject.site, subject.spliced)))
    placed = {name: _place(mesh, subject.sae) for name, subject in subjects.items()}
    of_sae = {name: metrics.Totals() for name in subjects}
    references = {site: metrics.Totals() for site in by_site}
    model, params = loaded.model, loaded.params

    batches = -(-count // max(-(-min(per_batch, count) // mesh.size) * mesh.size, 1))
    passes = batches * (1 + (2 if is_fast else 3) * len(by_site) + len(subjects))
    with tqdm.tqdm(total=passes, desc="Evaluating", unit="pass", dynamic_ncols=True) as bar:
        for rows in _batches(mesh, held_out_rows, count, per_batch):
            tokens_SxL = rows.tokens_SxL
            streams, values, clean_SxLxD = _clean(mesh, model, params, tokens_SxL, sites)
            clean = _loss(mesh, model, params, clean_SxLxD, tokens_SxL, prefix)

            def add(to: metrics.Totals, found: dict, rows: Rows = rows) -> None:
                fetched = hosts.fetch(found)
                real = {k: v if k.endswith("_M") else v[: rows.count] for k, v in fetched.items()}
                to.add(real, rows.position_SxL)

            bar.update()
            for site, group in by_site.items():
                y_SxLxO, before_SxLxD = values[site], streams[site.layer]
                splice = functools.partial(_spliced, mesh, model, params, before_SxLxD, tokens_SxL, site)
                mean_O = jnp.asarray(means[site])
                ablations = {
                    "zero": jnp.zeros_like(y_SxLxO),
                    "mean": jnp.broadcast_to(mean_O[None, None].astype(y_SxLxO.dtype), y_SxLxO.shape),
                }
                found = {"clean_SxL": clean["loss_SxL"], "scored_SxL": clean["scored_SxL"]}
                for name, replacement_SxLxO in ablations.items():
                    final_SxLxD = splice(replacement_SxLxO, prefix)
                    found[f"{name}_SxL"] = _loss(mesh, model, params, final_SxLxD, tokens_SxL, prefix)[
                        "loss_SxL"
                    ]
                    bar.update()
                add(references[site], found)
                importance_SxLxO = None
                if not is_fast:
                    importance_SxLxO = _importance(
                        mesh, model, params, before_SxLxD, y_SxLxO, tokens_SxL, site, prefix
                    )
                    bar.update()
                for name, subject in group.items():
                    x_SxLxD = values[subject.site]
                    recon_SxLxO, found = _reconstruct(
                        mesh, placed[name], x_SxLxD, y_SxLxO, mean_O, tokens_SxL, importance_SxLxO, prefix
                    )
                    final_SxLxD = splice(recon_SxLxO, prefix)
                    if is_fast:
                        loss = _loss(mesh, model, params, final_SxLxD, tokens_SxL, prefix)
                        found["loss_SxL"] = loss["loss_SxL"]
                    else:
                        found |= _divergence(
                            mesh, model, params, final_SxLxD, clean_SxLxD, tokens_SxL, prefix
                        )
                    add(of_sae[name], found)
                    bar.update()
    return {
        name: metrics.summarize(subject.sae, of_sae[name], references[subject.spliced])
        for name, subject in subjects.items()
    }
