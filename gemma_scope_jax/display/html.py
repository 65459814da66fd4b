"""Pages of templates, safe whatever stands in a name or a token."""

import base64
import pathlib

import jinja2

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.printing import lines, printable


def render(path: pathlib.Path, template: str, **values: object) -> None:
    """Writes a page made of one of this package's templates, named by its path within the package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gemma_scope_jax", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: lines(value) if type(value) is str else value,
    )
    environment.filters["line"] = printable
    rendered = environment.get_template(template).render(values)
    with files.replacing_file(path) as partial:
        partial.write_text(rendered, encoding="utf-8")


def data_url(png: bytes) -> str:
    """A picture as the address of an image, which a page then holds itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
