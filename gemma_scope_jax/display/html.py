"""Renders HTML pages from templates; names and tokens are escaped, so their content cannot break a page."""

import base64
import pathlib

import jinja2

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.printing import lines, printable


def render(path: pathlib.Path, template: str, **values: object) -> None:
    """Renders a template to a page; `template` is its path within this package."""
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
    """A data URL of a PNG, which embeds the picture in a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
