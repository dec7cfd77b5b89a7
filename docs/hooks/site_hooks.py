"""MkDocs' hooks: pages from outside docs/, generated parts, and links into the repository.

A line `<!-- generated: NAME -->` of a page is replaced by what NAME makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(links.ROOT))  # the code that is documented, and its benchmarks

import config_reference
import figures
import http_reference

EXAMPLES = links.ROOT / "docs" / "examples"


def example(name: str) -> Callable[[], str]:
    """A file of docs/examples, as it is."""
    return lambda: f"```bash\n{(EXAMPLES / name).read_text()}```"


GENERATED: dict[str, Callable[[], str]] = {
    **{f"examples/{path.name}": example(path.name) for path in EXAMPLES.iterdir()},
    "parts": config_reference.parts,
    "presets": config_reference.presets,
    "settings": config_reference.settings,
    "http": http_reference.reference,
    "sizing": figures.sizing,
    "sizing checks": figures.sizing_checks,
    "memory plans": figures.memory_plans,
    "memory checks": figures.memory_checks,
    "train step": figures.train_step,
    "sharded": figures.sharded,
    "token store": figures.token_store,
    "sharded, on paper": figures.sharded_on_paper,
    "quality": figures.quality,
    "stream": figures.stream,
    "analysis": figures.analysis,
    "recovery": figures.recovery,
    "service": figures.service,
    "circuits": figures.circuits,
}
_MARKER = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's own pages."""
    for source, name in links.OUTSIDE.items():
        if source.endswith(".md"):
            files.append(File.generated(config, name, content=(links.ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Generated parts first, then links."""
    name = page.file.src_uri
    source = next((path for path, known in links.OUTSIDE.items() if known == name), f"docs/{name}")

    def generate(match: re.Match[str]) -> str:
        if match[1] not in GENERATED:
            raise PluginError(f"{name}: nothing is called {match[1]!r}; there are: {', '.join(GENERATED)}")
        return GENERATED[match[1]]()

    return links.rewrite(_MARKER.sub(generate, markdown), source, name)
