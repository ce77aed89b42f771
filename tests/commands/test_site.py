"""`make docs`: the site is built, no link leads nowhere, and no page takes anything from another host."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FETCHED = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)=[\"'](?:https?:)?//[^\"']+", re.I)
IN_A_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", re.I)


def build(config: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_text_is_a_page(site: Path) -> None:
    texts = {path.stem for path in (ROOT / "docs").glob("*.md")}
    pages = {path.stem for path in site.glob("*.html")} - {"404", "search"}
    assert pages == texts | {"index", "changelog", "contributing", "security"}


def test_no_page_takes_anything_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert FETCHED.findall(page.read_text(encoding="utf-8")) == [], page.name
    for style in site.rglob("*.css"):
        assert not IN_A_STYLE.search(style.read_text(encoding="utf-8")), style.name


def test_links_between_pages_and_into_the_root_fit_the_site(site: Path) -> None:
    start, configuration = ((site / f"{name}.html").read_text() for name in ("index", "configuration"))
    assert 'href="clusters.html#signals-and-exit-codes"' in start
    assert 'href="security.html"' in configuration
    assert 'id="datatrain_batch_size"' in configuration
    assert 'href="../' not in start + configuration


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("site.py", "site.css"):
        (docs / name).write_text((ROOT / "docs" / name).read_text())
    for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY"):
        (tmp_path / f"{name}.md").write_text("# A text\n\n[gone](docs/gone.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text().partition("nav:\n  - ")[0]
    (tmp_path / "mkdocs.yml").write_text(settings + "nav: [index.md, changelog.md, contributing.md, security.md]\n")
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "gone.md" in built.stdout + built.stderr
