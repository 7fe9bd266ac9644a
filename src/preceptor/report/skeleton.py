"""The skeleton of all pages: templates that escape what they are given, their style, and the report's script."""

from functools import lru_cache
from importlib.resources import files

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from preceptor.report.facts import visible


@lru_cache
def templates(*packages: str) -> Environment:
    """The page's templates, which escape all values, and those of other packages that build on them."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "") for package in ("preceptor.report", *packages)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment


def style_and_script() -> dict[str, Markup]:
    """The values `css` and `js` of the page's templates."""
    parts = files("preceptor.report")
    return {kind: Markup((parts / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js")}
