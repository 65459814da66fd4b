"""Loads SAEs in any format, from disk or the Hugging Face Hub, with their model and site."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.models import registry
from gemma_scope_jax.models.sites import Site, check_site, site_from_hook, site_width
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import FormatError, InputError, RunError
from gemma_scope_jax.saes import finding, formats, jumprelu
from gemma_scope_jax.saes.formats import common


@dataclasses.dataclass(frozen=True, eq=False)  # Compared by identity: arrays have no truth value.
class LoadedSAE:
    """An SAE or transcoder from a file, for raw activations of a site."""

    name: str
    sae: jumprelu.SAE
    about: common.About
    model: str
    site: Site  # the site it reads
    target_site: Site  # the site it predicts; the same as `site` for an autoencoder
    # Whether it is in a run directory. Only then are the text, weights and tokenizer that it names opened without
    # being asked for: a file from elsewhere could name any path on this machine, or any address.
    is_of_run: bool = False

    def __repr__(self) -> str:
        target = "" if self.target_site == self.site else f" → {self.target_site}"
        return f"LoadedSAE({self.name!r}, {self.model}, {self.site}{target}, {self.sae.b_enc.size:,} latents)"

    def encode(self, x: jax.typing.ArrayLike, precision: jax.lax.Precision = jumprelu.EXACT) -> jax.Array:
        """Latent activations [..., M], in float32, of raw activations [..., D] of `site`.

        Raises:
          ValueError: if the activations have another width than the site.
        """
        x = jnp.asarray(x, jnp.float32)
        width, latents = self.sae.W_enc.shape
        if x.ndim == 0 or x.shape[-1] != width:
            raise InputError(f"{self.name} reads activations of width {width}; these have shape {x.shape}")
        f_BxM = jumprelu.encode(self._on_device, x.reshape(-1, width), precision)
        return f_BxM.reshape(*x.shape[:-1], latents)

    def decode(
        self,
        f: jax.typing.ArrayLike,
        x: jax.typing.ArrayLike | None = None,
        precision: jax.lax.Precision = jumprelu.EXACT,
    ) -> jax.Array:
        """The reconstruction or prediction [..., O], in float32, from latent activations [..., M].

        Args:
          f: latent activations.
          x: the raw activations that were encoded; needed only with a skip connection.
          precision: the precision of the matmuls.

        Raises:
          ValueError: if `f` has another number of latents, or if `x` is needed and missing.
        """
        f = jnp.asarray(f, jnp.float32)
        latents, width = self.sae.W_dec.shape
        if f.ndim == 0 or f.shape[-1] != latents:
            raise InputError(f"{self.name} has {latents} latents; these have shape {f.shape}")
        x_BxD = None if x is None else jnp.asarray(x, jnp.float32).reshape(-1, jnp.shape(x)[-1])
        out_BxO = jumprelu.decode(self._on_device, f.reshape(-1, latents), x_BxD, precision)
        return out_BxO.reshape(*f.shape[:-1], width)

    def __call__(self, x: jax.typing.ArrayLike) -> jax.Array:
        """The reconstruction of raw activations, or a transcoder's prediction from them."""
        return self.decode(self.encode(x), x)

    @functools.cached_property
    def _on_device(self) -> jumprelu.SAE:
        return jax.device_put(self.sae)


def read(
    location: str | pathlib.Path, model: str = "", site: str = "", target_site: str = ""
) -> Iterator[LoadedSAE]:
    """Yields the SAEs at a location, one at a time, each with a different name.

    Args:
      location: a path or `hf://OWNER/NAME/FOLDER`; with `*`, all SAEs that match.
      model: the model's name; needed for files that do not name it.
      site: the site read, such as `layer_9_resid_post`; needed for files that do not name it.
      target_site: the site a transcoder predicts; needed for files that do not name it.

    Raises:
      ValueError: if there is no SAE, if a file is broken, or if an SAE does not fit its model.
    """
    of_places = ((place, found) for place in finding.paths(str(location)) for found in formats.read(place))
    taken: set[str] = set()
    for place, found in of_places:
        about = found.about
        if not (model or about.model_name) or not (site or about.hook_name):
            raise FormatError(
                f"{location} does not name its model and site; give them, for example "
                "--model=gemma2_2b --site=layer_20_resid_post, and for a transcoder --target-site"
            )
        hook_out = target_site or about.hook_name_out
        try:
            name = model or registry.name_from_hugging_face(about.model_name)
            reads = site_from_hook(site or about.hook_name)
            predicts = site_from_hook(hook_out) if hook_out else reads
        except ValueError as error:
            raise FormatError(
                f"{location}: {error}; if the file uses another name, give --model, --site or --target-site"
            ) from error
        stored = found.sae
        if formats.FORMATS[found.format].embedding_scale and reads.kind == "embed":
            stored = common.in_other_units(stored, embedding_scale(name))
        check(location, name, stored, reads, predicts)
        is_of_run = not str(location).startswith("hf://") and _is_in_run(place)
        called = found.name
        for above in (place, *place.absolute().parents):
            if called in taken and above.name != found.name:
                called = f"{above.name}_{called}"
        taken.add(called)
        yield LoadedSAE(called, stored, about, name, reads, predicts, is_of_run)


def _is_in_run(path: pathlib.Path) -> bool:
    """Whether a path, with links resolved, is where a run stores its SAEs: `RUN/sae/NAME`."""
    path = path.resolve()
    place = (path.parent if path.is_file() else path).parent
    return place.name == "sae" and is_run(place.parent)


def embedding_scale(model: str) -> float:
    """√D: Gemma Scope's SAEs read token embeddings, but the site `embed` is the embeddings times √D."""
    return registry.build_model(model).config.embed_dim ** 0.5


def check(
    location: str | pathlib.Path, name: str, stored: jumprelu.SAE, site: Site, target_site: Site
) -> None:
    """Raises ValueError if an SAE does not fit a model."""
    model = registry.build_model(name)
    for place, width, does in (
        (site, stored.W_enc.shape[0], "reads"),
        (target_site, stored.W_dec.shape[1], "outputs"),
    ):
        check_site(model, place)
        if width != site_width(model, place):
            raise FormatError(
                f"{location} {does} activations of width {width}, but {place} of {name} has width "
                f"{site_width(model, place)}"
            )


def is_run(path: pathlib.Path) -> bool:
    """Whether a path is a run directory. A config.json alone is not enough: other formats have one too."""
    return (path / "config.json").exists() and (path / "checkpoints").exists()


def run_config(workdir: pathlib.Path) -> config_lib.Config:
    """The config of a run directory."""
    path = workdir / "config.json"
    if not path.exists():
        raise RunError(f"{workdir} is not a run directory: it has no config.json")
    values = files.read_json(path)
    with files.reading(path, "a run's config"):
        return config_lib.from_dict(values)
