"""Links that work in the repository and on the site: what lies outside docs/ is a page of the site, or a path."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "k8s/README.md": "kubernetes.md",
    "k8s": "kubernetes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
}
"""Files of the repository that are pages of the site, and their names there."""
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?P<code>(?P<ticks>`+).+?(?P=ticks))|!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.DOTALL)

logger = logging.getLogger("mkdocs.hooks.links")


def rewrite(markdown: str, source: str, page: str) -> str:
    """The text of `source`, a path in the repository, for the site's page `page`."""
    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [_links(markdown[end : fence.start()], source, page), fence[0]]
        end = fence.end()
    return "".join([*pieces, _links(markdown[end:], source, page)])


def _links(markdown: str, source: str, page: str) -> str:
    def one(match: re.Match[str]) -> str:
        if match["code"] or re.match(r"[a-z]+:|#|/", match["target"]):
            return match[0]
        target, hash_, anchor = match["target"].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if name is None:
            if not (ROOT / path).exists():
                logger.warning("%s: there is no %s", source, path)
            shown = match["text"]
            return shown if path in shown or shown.startswith("`") else f"{shown} (`{path}`)"
        if source.startswith("docs/") and path not in OUTSIDE:
            return match[0]  # MkDocs checks it
        relative = posixpath.relpath(name, posixpath.dirname(page) or ".")
        return match[0].replace(f"({match['target']})", f"({relative}{hash_}{anchor})")

    return _LINK.sub(one, markdown)
