"""Hooks of mkdocs: pages of the repository that lie outside of docs/, and the API reference.

README is the first page. What a page links to in the repository becomes a part of the site under its own path. The API
reference has a page for each comment in the ``__all__`` of ``leafkernels/__init__.py`` and one for each sub-package
with public names; its text is that of the docstrings.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "Models": "leafkernels.models",
    "Several ranks": "leafkernels.distributed",
    "Look-ahead": "leafkernels.lookahead",
    "Layouts of trainers": "leafkernels.integrations.layouts",
    "TRL": "leafkernels.integrations.trl",
    "TRL, audio": "leafkernels.integrations.trl_audio",
    "TRL, distillation": "leafkernels.integrations.trl_distillation",
    "Rewards of speech": "leafkernels.integrations.speech_rewards",
    "verl": "leafkernels.integrations.verl",
}
_LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def names_by_page(source: str) -> dict[str, list[str]]:
    """The names of ``__all__`` in a module, by the comments between them."""
    lines = source.splitlines()
    (listed,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"
    )
    found: dict[str, list[str]] = {}
    for line in lines[listed.lineno : (listed.end_lineno or 0) - 1]:
        if line.strip().startswith("# "):
            found[line.strip()[2:]] = []
        elif not found:
            raise ValueError(
                f"leafkernels/__init__.py: __all__ must begin with a comment that names a page, got {line}"
            )
        else:
            list(found.values())[-1].append(ast.literal_eval(line.strip().rstrip(",")))
    return found


def api_pages() -> dict[str, str]:
    """Titles, and what stands on the pages of the API reference."""
    source = (ROOT / "leafkernels/__init__.py").read_text(encoding="utf-8")
    pages = {title: [f"leafkernels.{name}" for name in names] for title, names in names_by_page(source).items()}
    texts = {title: "\n\n".join(f"::: {name}" for name in names) for title, names in pages.items()}
    return texts | {title: f"::: {module}" for title, module in PACKAGES.items()}


def in_repository(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def site_path(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def linked(path: str) -> dict[str, str]:
    """The links of a page to files of the repository, and these files."""
    text = (ROOT / path).read_text(encoding="utf-8")
    targets = {
        link: posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link, _ in _LINK.findall(text)
    }
    return {link: target for link, target in targets.items() if (ROOT / target).is_file()}


def on_files(files: Any, config: Any) -> Any:
    waiting, seen = ["README.md", *(in_repository(file.src_uri) for file in files.documentation_pages())], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += linked(path).values()
    for title, text in api_pages().items():
        uri = f"api/{re.sub('[^a-z]+', '_', title.lower())}.md"
        files.append(File.generated(config, uri, content=f"# {title}\n\n{text}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    path = in_repository(page.file.src_uri)
    if not (ROOT / path).exists():
        return markdown
    targets = linked(path)

    def relative(match: re.Match[str]) -> str:
        link, anchor = match.groups(default="")
        if link not in targets:
            return match.group()
        return f"]({posixpath.relpath(site_path(targets[link]), posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return _LINK.sub(relative, markdown)


class Docstrings(griffe.Extension):
    """Reads ``Example:`` as the section that it is, not as a remark."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
