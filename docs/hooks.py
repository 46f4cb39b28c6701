"""Takes CONTRIBUTING.md and CHANGELOG.md from the top of the repository into the site, with adapted links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the text of a page; mkdocs calls this for every page before it becomes HTML."""
    source = INCLUDED.get(page.file.src_uri)
    return markdown if source is None else into_site((REPOSITORY / source).read_text(encoding="utf-8"))


def into_site(text: str) -> str:
    """Return the text of a page with links to pages of the site; links to other files become plain text."""
    pages = {source: page for page, source in INCLUDED.items()}

    def adapted(link: re.Match[str]) -> str:
        title, target = link.groups()
        page = pages.get(target, target.removeprefix("docs/"))
        return f"[{title}]({page})" if page != target else title

    return _LINK.sub(adapted, text)
