"""Writes a build for the Kernel Hub: ``python .ci/hub.py FOLDER``, then ``kernels.get_local_kernel(Path(FOLDER))``.

The package below FOLDER/build/torch-universal imports itself relatively and is named after its contents, as its
operations are, so that it runs beside the installed package and beside builds of other versions. ``python_ref`` is in
it; what is for a trainer or a command is not.
"""

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"integrations", "lookahead", "__main__.py"}


def relative(source: str, depth: int, where: Path) -> str:
    """The source with imports of the two packages relative to a module ``depth`` folders below the top."""
    up = "." * (depth + 1)
    rules = [
        (r"\bfrom leafkernels\b\.?", f"from {up}"),
        (r"\bfrom python_ref\b", f"from {up}python_ref"),
        (r"\bimport leafkernels\.(\w+)\.(\w+) as ", rf"from {up}\1 import \2 as "),
        (r"\bimport python_ref$", f"from {up} import python_ref"),
    ]
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        names = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        )
        if not any(str(name).split(".")[0] in ("leafkernels", "python_ref") for name in names):
            continue
        line = lines[node.lineno - 1]
        found = [re.sub(pattern, by, line) for pattern, by in rules if re.search(pattern, line)]
        if len(found) != 1:
            raise SystemExit(f"{where} must import by from, so that it can be made relative; got {line.strip()}")
        (lines[node.lineno - 1],) = found
    return "\n".join(lines) + "\n"


def build(folder: Path) -> Path:
    files: dict[Path, bytes] = {}
    for package, to in (("leafkernels", Path()), ("python_ref", Path("python_ref"))):
        for path in sorted((ROOT / package).rglob("*")):
            below = path.relative_to(ROOT / package)
            if not path.is_file() or path.suffix == ".pyc" or below.parts[0] in LEFT_OUT:
                continue
            content = path.read_bytes()
            if path.suffix == ".py":
                content = relative(content.decode(), len((to / below).parts) - 1, path).encode()
            files[to / below] = content
    digest = hashlib.sha256(b"".join(f"{path}\0{len(text)}\0".encode() + text for path, text in files.items()))
    about = {
        "id": f"_leafkernels_{digest.hexdigest()[:12]}",
        "name": "leafkernels",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},  # a field that must be there; what decides is the name of the folder
    }
    files[Path("metadata.json")] = (json.dumps(about, indent=2) + "\n").encode()
    target = folder / "build" / "torch-universal"
    shutil.rmtree(target, ignore_errors=True)
    for path, content in files.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python .ci/hub.py FOLDER")
    print(build(Path(sys.argv[1])))
