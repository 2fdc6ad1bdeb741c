"""Fills a template into one self-contained page of HTML: styles and pictures inside, all text of others escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_dpo.data.dialogue import sanitize_text


def render_page(template: str, **values: Any) -> str:
    """The page; every value is escaped unless it is Markup, and control characters are left out."""
    environment = Environment(
        loader=PackageLoader("qlora_dpo.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: sanitize_text(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(**values)
