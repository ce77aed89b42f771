"""Hooks of `mkdocs build`: the texts of the repository's root become pages, and links fit the site."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""File of the root -> page of the site."""
ROOT_OF = {page: file for file, page in PAGES.items()}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`(?!\]))", re.S | re.M)


def on_files(files: Files, config: Any) -> Files:
    """The files with the texts of the root; a page that the navigation does not name is under More."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    named = set(re.findall(r"[\w.]+\.md", str(config.nav)))
    others = [file.src_uri for file in files.documentation_pages() if file.src_uri not in named]
    if others:
        config.nav.append({"More": sorted(others)})
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links that fit the site. Code stays as it is."""
    folder = "" if page.file.src_uri in ROOT_OF else "docs"
    pieces = CODE.split(markdown)
    return "".join(piece if index % 2 else _linked(piece, folder) for index, piece in enumerate(pieces))


def _linked(text: str, folder: str) -> str:
    return LINK.sub(lambda found: _target(found, folder), text)


def _target(found: re.Match[str], folder: str) -> str:
    """A link to a page of the site, or only the words where it leads to a source file, which the site does not hold."""
    words, path, anchor = found[1], posixpath.normpath(posixpath.join(folder, found[2])), found[3] or ""
    if path in PAGES:
        return f"[{words}]({PAGES[path]}{anchor})"
    if path.startswith("docs/") and path.endswith(".md"):
        return f"[{words}]({path.removeprefix('docs/')}{anchor})"
    return words if (ROOT / path).exists() else found[0]
