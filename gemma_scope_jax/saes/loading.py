"""SAEs of files, in any format, here or on Hugging Face's hub: what model and site they are of."""

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


@dataclasses.dataclass(frozen=True, eq=False)  # By identity: arrays have no truth.
class LoadedSAE:
    """An SAE of a file on raw activations of a site, or a transcoder."""

    name: str
    sae: jumprelu.SAE
    about: common.About
    model: str
    site: Site  # what it reads
    target_site: Site  # what it predicts; an autoencoder's is the site that it reads
    # Whether it lies in a run directory. Only then may the text, weights and tokenizer that it names be opened
    # unasked: the file of a stranger may name anything on this machine, or on any other.
    is_of_run: bool = False

    def __repr__(self) -> str:
        target = "" if self.target_site == self.site else f" → {self.target_site}"
        return f"LoadedSAE({self.name!r}, {self.model}, {self.site}{target}, {self.sae.b_enc.size:,} latents)"

    def encode(self, x: jax.typing.ArrayLike, precision: jax.lax.Precision = jumprelu.EXACT) -> jax.Array:
        """Latents [..., M] of raw activations [..., D] of the site that it reads, in float32.

        Raises:
          ValueError: the activations are not as wide as those of its site.
        """
        x = jnp.asarray(x, jnp.float32)
        width, latents = self.sae.W_enc.shape
        if x.ndim == 0 or x.shape[-1] != width:
            raise InputError(
                f"{self.name} reads activations of {width} numbers each; these are of shape {x.shape}"
            )
        f_BxM = jumprelu.encode(self._on_device, x.reshape(-1, width), precision)
        return f_BxM.reshape(*x.shape[:-1], latents)

    def decode(
        self,
        f: jax.typing.ArrayLike,
        x: jax.typing.ArrayLike | None = None,
        precision: jax.lax.Precision = jumprelu.EXACT,
    ) -> jax.Array:
        """Raw activations [..., O] from latents [..., M]; a skip connection also takes what was encoded, `x`."""
        f = jnp.asarray(f, jnp.float32)
        latents, width = self.sae.W_dec.shape
        if f.ndim == 0 or f.shape[-1] != latents:
            raise InputError(f"{self.name} has {latents} latents; these are of shape {f.shape}")
        x_BxD = None if x is None else jnp.asarray(x, jnp.float32).reshape(-1, jnp.shape(x)[-1])
        out_BxO = jumprelu.decode(self._on_device, f.reshape(-1, latents), x_BxD, precision)
        return out_BxO.reshape(*f.shape[:-1], width)

    def __call__(self, x: jax.typing.ArrayLike) -> jax.Array:
        """What it makes of raw activations: their reconstruction, or what a transcoder predicts."""
        return self.decode(self.encode(x), x)

    @functools.cached_property
    def _on_device(self) -> jumprelu.SAE:
        return jax.device_put(self.sae)


def read(
    location: str | pathlib.Path, model: str = "", site: str = "", target_site: str = ""
) -> Iterator[LoadedSAE]:
    """The SAEs at a location, one after the other, no two of one name.

    Args:
      location: a path, or `hf://OWNER/NAME/FOLDER`; with `*` several.
      model: its name, for files that do not name it.
      site: what is read, as in `layer_9_resid_post`, likewise.
      target_site: what a transcoder predicts, likewise.

    Raises:
      ValueError: there is none, it is broken, or does not fit its model.
    """
    of_places = ((place, found) for place in finding.paths(str(location)) for found in formats.read(place))
    taken: set[str] = set()
    for place, found in of_places:
        about = found.about
        if not (model or about.model_name) or not (site or about.hook_name):
            raise FormatError(
                f"{location} does not say of which model and site it is; give them, for example "
                "--model=gemma2_2b --site=layer_20_resid_post, and for a transcoder --target-site"
            )
        hook_out = target_site or about.hook_name_out
        try:
            name = model or registry.name_from_hugging_face(about.model_name)
            reads = site_from_hook(site or about.hook_name)
            predicts = site_from_hook(hook_out) if hook_out else reads
        except ValueError as error:
            raise FormatError(
                f"{location}: {error}; if the file calls it otherwise, give --model, --site or --target-site"
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
    """Whether an SAE lies, links followed, where a run keeps its own: in `RUN/sae/NAME`."""
    path = path.resolve()
    place = (path.parent if path.is_file() else path).parent
    return place.name == "sae" and is_run(place.parent)


def embedding_scale(model: str) -> float:
    """√D: Gemma Scope's SAEs read a token's embedding, `embed` is the stream that begins with so many times that."""
    return registry.build_model(model).config.embed_dim ** 0.5


def check(
    location: str | pathlib.Path, name: str, stored: jumprelu.SAE, site: Site, target_site: Site
) -> None:
    """Raises ValueError if an SAE does not fit a model."""
    model = registry.build_model(name)
    for place, width, does in (
        (site, stored.W_enc.shape[0], "takes"),
        (target_site, stored.W_dec.shape[1], "gives"),
    ):
        check_site(model, place)
        if width != site_width(model, place):
            raise FormatError(
                f"{location} {does} activations of width {width}, but {place} of {name} has width "
                f"{site_width(model, place)}"
            )


def is_run(path: pathlib.Path) -> bool:
    """Whether a path is a run directory; other formats have a config.json too."""
    return (path / "config.json").exists() and (path / "checkpoints").exists()


def run_config(workdir: pathlib.Path) -> config_lib.Config:
    """The config of a run directory."""
    path = workdir / "config.json"
    if not path.exists():
        raise RunError(f"{workdir} is no run directory: it has no config.json")
    values = files.read_json(path)
    with files.reading(path, "a run's config"):
        return config_lib.from_dict(values)
