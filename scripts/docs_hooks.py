"""What the documentation site has beside docs/ (hooks of mkdocs, see mkdocs.yml).

- index.md is README.md.
- policies/ has a page for each policy, made of its docstring.
- A file outside of docs/ that a page links to is copied to source/; a folder becomes a list of its files.
"""

import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import kvpress

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def policies() -> dict[str, type[kvpress.Policy]]:
    """The toolkit's own ones, by name."""
    known = kvpress.available().items()
    return {name: policy for name, policy in known if policy.__module__.startswith("kvpress.policies.")}


def on_config(config: Any) -> Any:
    """Lay out the package as it is installed, for mkdocstrings to read, and fill the list of policies."""
    tree = ROOT / "build" / "docs"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "kvpress").mkdir(parents=True)
    parts = [*(ROOT / "kvpress").iterdir(), *(ROOT / name for name in ("evals", "kernels", "policies"))]
    for part in parts:
        if part.name != "__pycache__":
            (tree / "kvpress" / part.name).symlink_to(part)
    pages: list[Any] = ["policies/index.md"]
    pages += [{policy.__name__: f"policies/{name}.md"} for name, policy in policies().items()]
    for entry in config.nav:
        if "Policies" in entry:
            entry["Policies"] = pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here, and whatever pages link to outside of docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "policies/index.md", content=overview()))
    for name, policy in policies().items():
        files.append(File.generated(config, f"policies/{name}.md", content=page_of(name, policy)))
    for path in sorted({path for page in files.documentation_pages() for path in outside(page)}):
        add(path, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Point links at where their files are on the site."""
    return LINK.sub(lambda match: match[1] + target(match[2], page.file) + match[3], markdown)


def overview() -> str:
    """The page above the policies': what each is, in a line."""
    rows = [
        f"| [{policy.__name__}]({name}.md) | `{name}` | {policy.kind} | {idea(policy)} |"
        for name, policy in policies().items()
    ]
    return "\n".join(["# Policies", "", "| class | name | kind | idea |", "|---|---|---|---|", *rows, ""])


def page_of(name: str, policy: type[kvpress.Policy]) -> str:
    """A policy's page: how it is asked for, then its docstring with its fields."""
    lines = [
        f"# {policy.__name__}",
        "",
        f'Kind: {policy.kind}. Name in YAML files and on the command line: `"{name}"`.',
    ]
    if policy.paper:
        lines[-1] += f" Paper: {policy.paper}."
    return "\n".join([*lines, "", f"::: {policy.__module__}.{policy.__name__}", ""])


def idea(policy: type[kvpress.Policy]) -> str:
    """The first sentence or two of its docstring, as a cell of a table."""
    return " ".join((policy.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")


def home(file: Any) -> Path:
    """The folder that a page's links start from."""
    if file.src_uri == "index.md":
        return ROOT
    return (DOCS / file.src_uri).parent


def linked(link: str, file: Any) -> Path | None:
    """The file or folder of this repository that a link of a page means; None if there is none. A folder is its README."""
    path = Path(os.path.normpath(home(file) / link))
    if file.src_uri.startswith("source/") or not path.exists():
        return None
    return path / "README.md" if (path / "README.md").is_file() else path


def outside(file: Any) -> set[Path]:
    """What a page links to that is no file of docs/."""
    found = {linked(match[2], file) for match in LINK.finditer(file.content_string)}
    return {path for path in found if path is not None and not (path.is_relative_to(DOCS) and path.is_file())}


def target(link: str, file: Any) -> str:
    """Where a link leads on the site; what is not in this repository stays as it is, and mkdocs complains."""
    path = linked(link, file)
    if path is None:
        return link
    if path.is_relative_to(DOCS) and path.is_file():
        place = path.relative_to(DOCS).as_posix()
    else:
        place = source(path) + ("/index.md" if path.is_dir() else "")
    return posixpath.relpath(place, posixpath.dirname(file.src_uri) or ".")


def source(path: Path) -> str:
    """Where a file is copied to. Markdown is shown as it is written, for it is no page of the site."""
    return f"source/{path.relative_to(ROOT).as_posix()}" + (".txt" if path.suffix == ".md" else "")


def add(path: Path, files: Any, config: Any) -> None:
    """Put a file on the site as it is, or a folder as the list of its files."""
    if path.is_file():
        if files.get_file_from_path(source(path)) is None:
            files.append(File.generated(config, source(path), abs_src_path=str(path)))
        return
    lines = [f"# {path.relative_to(ROOT).as_posix()}", ""]
    for one in sorted(one for one in path.rglob("*") if one.is_file()):
        add(one, files, config)
        lines.append(f"- [{one.relative_to(path).as_posix()}]({posixpath.relpath(source(one), source(path))})")
    files.append(File.generated(config, f"{source(path)}/index.md", content="\n".join([*lines, ""])))
