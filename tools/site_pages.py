"""The source of the documentation site: docs/ and the examples' pages, with the navigation of docs/README.md.

    site_pages.py FOLDER CONFIG

Links that leave those pages lead to the repository's files, so they are copied beside them.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
PAGES = [
    *(ROOT / "docs").rglob("*.md"),
    *ROOT.glob("examples/*/README.md"),
    *ROOT.glob("site_profiles/*/README.md"),
]
CONFIG = {
    "site_name": "hpctrain",
    "site_description": "One run.yaml becomes the Slurm jobs, configs and checkpoint chain of an LLM training run",
    "use_directory_urls": False,  # so that file:// works
    "theme": {
        "name": "material",
        "font": False,  # nothing is fetched from elsewhere
        "features": [
            "navigation.sections",
            "navigation.top",
            "content.code.copy",
            "search.highlight",
            "toc.follow",
        ],
        "palette": [
            {
                "media": f"(prefers-color-scheme: {scheme})",
                "scheme": name,
                "primary": "indigo",
                "toggle": {"icon": f"material/weather-{icon}", "name": f"to the {other} pages"},
            }
            for scheme, name, icon, other in (
                ("light", "default", "sunny", "dark"),
                ("dark", "slate", "night", "light"),
            )
        ],
    },
    "plugins": ["search", "offline"],
    "extra": {"polyfills": ["assets/iframe-worker.js"]},  # else the plugin takes one from the net
    "markdown_extensions": [
        "tables",
        "admonition",
        {"toc": {"permalink": True}},
        "pymdownx.highlight",
        "pymdownx.superfences",
    ],
    "validation": {
        "links": {"anchors": "warn", "absolute_links": "warn", "unrecognized_links": "warn"}
    },
}


def main(folder: Path, config: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for page in PAGES:
        target = folder / place(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(moved(page, folder), encoding="utf-8")
    (folder / "assets").mkdir()
    shutil.copy(ROOT / "tools/iframe-worker.js", folder / "assets")
    nav = navigation((ROOT / "docs/README.md").read_text(encoding="utf-8"))
    content = {**CONFIG, "docs_dir": str(folder.resolve()), "nav": nav}
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def place(page: Path) -> Path:
    """Where a page of the repository is in the site: docs/ is its root."""
    path = page.relative_to(ROOT)
    if path == Path("docs/README.md"):
        return Path("index.md")
    return path.relative_to("docs") if path.parts[0] == "docs" else path.with_name("index.md")


def moved(page: Path, folder: Path) -> str:
    """The page's text, its links as they are in the site."""

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        if re.match(r"[a-z]+:", path):
            return found[0]
        target = (page.parent / path).resolve()
        if not target.exists():
            raise SystemExit(f"error: {page.relative_to(ROOT)}: {path} is not there")
        if target in PAGES:
            there = place(target)
        else:
            # A file of the repository: GitHub shows it, and the site has a copy (as text, for browsers).
            there = Path("files") / target.relative_to(ROOT)
            if target.is_dir():
                return words
            copy = folder / there.with_name(there.name + ".txt")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copy)
            there = copy.relative_to(folder)
        up = "../" * (len(place(page).parts) - 1)
        return f"[{words}]({up}{there.as_posix()}{anchor})"

    text = page.read_text(encoding="utf-8")
    out, end = [], 0
    for fence in [*FENCE.finditer(text), None]:
        out.append(LINK.sub(link, text[end : fence.start() if fence else len(text)]))
        if fence:
            out.append(fence[0])
            end = fence.end()
    # Python-Markdown, unlike GitHub, wants a blank line before a list.
    return re.sub(r"(?m)^(\*\*[^\n]+\*\*[^\n]*)\n(?=- )", r"\1\n\n", "".join(out))


def navigation(index: str) -> list[dict[str, object]]:
    """The sections of the index (lines that begin bold) with the pages that each links."""
    out: list[dict[str, object]] = [{"hpctrain": "index.md"}]
    pages: list[dict[str, str]] = []
    for line in index.splitlines():
        heading = re.match(r"\*\*([^*]+)\*\*", line)
        if heading:
            pages = []
            out.append({heading[1]: pages})
        for found in LINK.finditer(line):
            target = (ROOT / "docs" / found[2]).resolve()
            title = found[1].replace("`", "")
            if title.split()[0].isalpha():  # not a name, such as `neox-sft:` or `run.yaml`
                title = title[:1].upper() + title[1:]
            pages.append({title: place(target).as_posix()})
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
