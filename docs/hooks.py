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
    "TRL, asynchronous": "leafkernels.integrations.trl_async",
    "TRL, audio": "leafkernels.integrations.trl_audio",
    "TRL, distillation": "leafkernels.integrations.trl_distillation",
    "TRL, distillation of speech": "leafkernels.integrations.trl_audio_distillation",
    "Rewards of speech": "leafkernels.integrations.speech_rewards",
    "verl": "leafkernels.integrations.verl",
}
_LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def public_names(source: str) -> tuple[ast.List, list[str]] | None:
    """``__all__`` of a module and its names."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return node.value, ast.literal_eval(node.value)
    return None


def names_by_page(source: str) -> dict[str, list[str]]:
    """The names of ``__all__`` in a module, by the comments between them."""
    listed, _ = public_names(source)
    found: dict[str, list[str]] = {}
    for line in source.splitlines()[listed.lineno : listed.end_lineno - 1]:
        if line.strip().startswith("# "):
            found[line.strip()[2:]] = []
        elif not found:
            raise ValueError(f"__all__ of leafkernels must begin with a comment that names a page, got {line}")
        else:
            list(found.values())[-1].append(ast.literal_eval(line.strip().rstrip(",")))
    return found


def where_defined(package: str, name: str) -> str:
    """The full name of what a package names in its ``__all__``: a function may be called like the module it is in."""
    folder = ROOT / package.replace(".", "/")
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    for file in files:
        if re.search(rf"^(?:def|class) {name}\b", file.read_text(encoding="utf-8"), re.M):
            return ".".join([*file.relative_to(ROOT).with_suffix("").parts, name])
    return f"{package}.{name}"


def api_pages() -> dict[str, str]:
    """Titles, and what stands on the pages of the API reference."""
    pages = names_by_page((ROOT / "leafkernels/__init__.py").read_text(encoding="utf-8"))
    flat = {name for names in pages.values() for name in names}
    paths = {title: [f"leafkernels.{name}" for name in names] for title, names in pages.items()}
    for title, package in PACKAGES.items():
        file = ROOT / package.replace(".", "/")
        source = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text(encoding="utf-8")
        public = public_names(source)
        # Of a plug of one trainer everything is shown.
        if public is None or package == PACKAGES["Rewards of speech"]:
            paths[title] = [package]
        else:
            paths[title] = [where_defined(package, name) for name in public[1] if name not in flat]
    return {title: "\n\n".join(f"::: {path}" for path in found) for title, found in paths.items()}


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
