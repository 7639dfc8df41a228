"""Keeps the layout of docs/architecture.md: who may import whom, file sizes, opening sentences.

Reads the sources with `ast` and `pathlib` only; nothing is imported and no tool is needed.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "feinwerk"
CSRC = ROOT / "csrc"
MAX_LINES = 400

FOLDERS = {"csrc", "python", "benchmarks", "tests", "docs"}
GENERATED = {"build", "dist", "site", "__pycache__"}
SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".c", ".cpp", ".inc"}


def sources(*suffixes: str) -> list[Path]:
    found = []
    for folder in sorted(FOLDERS):
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(ROOT).parts)
            if path.suffix in suffixes and not hidden and not GENERATED & set(path.parts):
                found.append(path)
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PYTHON = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
MODULES = {modules(path) for path in PYTHON}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: import by absolute name"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                # ops/<op> is a package and a function of the same name: the package is meant.
                found.add(full if full in MODULES else module)
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def ours(path: Path) -> set[str]:
    return {module for module in imports(path) if top(module) == "feinwerk"}


def third_party(path: Path) -> set[str]:
    return {top(m) for m in imports(path)} - set(sys.stdlib_module_names) - {"feinwerk"}


def op_files(name: str) -> list[Path]:
    return sorted((PACKAGE / "ops").glob(f"*/{name}"))


def test_top_level_folders() -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    # The quickstart, the README's first command, leaves its folders here, too.
    left = [f for f in folders - FOLDERS - GENERATED if not f.startswith("feinwerk-quickstart")]
    unknown = {f for f in left if not f.endswith(".egg-info")}
    assert not unknown


def test_an_op_is_a_folder_of_the_same_files() -> None:
    for folder in sorted(p for p in (PACKAGE / "ops").iterdir() if p.is_dir()):
        if folder.name == "__pycache__":
            continue
        files = {p.name for p in folder.glob("*.py")}
        assert files >= {"__init__.py", "op.py", "reference.py", "cpp.py"}, folder.name
        files -= {"__init__.py", "op.py", "reference.py", "cpp.py"}
        # An op whose kernels need more than one file calls the others triton_<what>.py.
        assert not {name for name in files if not re.fullmatch(r"triton(_\w+)?\.py", name)}


@pytest.mark.parametrize("path", op_files("reference.py"), ids=name_of)
def test_reference_imports(path: Path) -> None:
    for module in ours(path):
        other_reference = module.startswith("feinwerk.ops.") and module.endswith(".reference")
        assert module in ("feinwerk.codebook", "feinwerk.philox") or other_reference, module
    assert third_party(path) <= {"torch"}


@pytest.mark.parametrize("path", op_files("cpp.py"), ids=name_of)
def test_cpp_imports(path: Path) -> None:
    assert all(module.startswith("feinwerk._native") for module in ours(path))
    assert third_party(path) <= {"torch"}


def test_triton_imports() -> None:
    for path in op_files("triton*.py"):
        names = ("triton_lib", "triton_tuning", "codebook", "philox")
        shared = {f"feinwerk.{name}" for name in names}
        kernels = {m for m in ours(path) if re.fullmatch(r"feinwerk\.ops\.\w+\.triton\w*", m)}
        assert ours(path) <= shared | kernels, name_of(path)
        assert third_party(path) <= {"numpy", "torch", "triton"}, name_of(path)


@pytest.mark.parametrize("path", op_files("op.py"), ids=name_of)
def test_op_imports(path: Path) -> None:
    own = f"feinwerk.ops.{path.parent.name}"
    allowed = {"feinwerk._library", "feinwerk._checks"}
    allowed |= {f"{own}.{backend}" for backend in ("reference", "cpp", "triton")}
    public = {f"feinwerk.ops.{folder.name}" for folder in (PACKAGE / "ops").iterdir()}
    assert ours(path) <= allowed | public
    assert third_party(path) <= {"torch"}


def layer(path: Path) -> str:
    """The part a file belongs to: its folder or its stem directly below feinwerk."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# Which of our parts a part must not import; `_C` and triton have their own rules below.
FORBIDDEN = {
    "weight": {"nn", "optim", "_native", "_library"},
    "checkpoint": {"nn", "optim", "_native", "_library"},
    "slabs": {"nn", "optim", "_native", "_library"},
    "nn": {"optim", "_native", "_library", "integrations", "cli", "onnx", "distributed"},
    "optim": {"nn", "_native", "_library", "integrations", "cli", "onnx", "distributed"},
    "onnx": {"optim", "distributed", "_native", "_library", "integrations", "cli"},
    "distributed": {"onnx", "_native", "_library", "integrations", "cli"},
    "integrations": {"_native", "_library", "cli"},
    "plan": {"_native", "_library"},
    "explain": {"_native", "_library"},
    "cli": {"_native", "_library"},
    "codebook": {"ops", "nn", "optim", "_native", "_library"},
    "_checks": {"ops", "nn", "optim", "_native", "_library"},
    "_native": {"ops", "nn", "optim", "_library"},
    "_library": {"ops", "nn", "optim"},
}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_layers(path: Path) -> None:
    part = layer(path)
    used = {module.split(".")[1] for module in ours(path) if "." in module}
    assert not used & FORBIDDEN.get(part, set())
    if part in ("weight", "nn", "optim", "onnx", "distributed", "integrations", "cli"):
        inside = {m for m in ours(path) if m.startswith("feinwerk.ops.") and m.count(".") > 2}
        assert not inside, f"use the public functions of feinwerk.ops, not {inside}"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_single_owners(path: Path) -> None:
    text, used = path.read_text(), imports(path)
    if layer(path) != "_native":
        assert "feinwerk._C" not in used, "only _native.py imports _C"
        # A Triton kernel over a list of tensors reads their addresses from a table.
        if layer(path) != "triton_lib":
            assert "data_ptr(" not in text, "only _native.py takes addresses"
    if layer(path) != "_library":
        assert not {m for m in used if m == "torch.library"}, "only _library.py registers ops"
        assert "torch.library." not in text.replace("torch.library.opcheck", "")
    if not path.name.startswith("triton"):
        assert "triton" not in {top(m) for m in used}
    assert ".new_empty(" not in text, "torch.empty is what the tests poison"
    if top(modules(path)) == "feinwerk" and layer(path) not in ("integrations", "cli"):
        at_the_top = {
            top(alias.name if isinstance(node, ast.Import) else node.module or "")
            for node in ast.parse(text).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        optional = {"onnx", "onnxruntime", "transformers", "peft", "safetensors", "bitsandbytes"}
        assert not at_the_top & optional


def test_the_package_opens_quickly() -> None:
    assert len((PACKAGE / "__init__.py").read_text().splitlines()) <= 60


INTRINSICS = re.compile(r"(imm|[a-z]mm)intrin\.h|x86intrin\.h|arm_neon\.h|arm_.*\.h")


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+([<"][^>"]+[>"])', path.read_text(), re.MULTILINE)


def c_files(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((CSRC / folder).rglob("*"))
        if path.suffix in SOURCE_SUFFIXES
    ]


@pytest.mark.parametrize("path", c_files("kernels", "simd"), ids=name_of)
def test_kernel_includes(path: Path) -> None:
    for include in includes(path):
        header = include[1:-1]
        if include.startswith("<"):
            assert header in ("stdint.h", "string.h") or INTRINSICS.fullmatch(header), include


@pytest.mark.parametrize("path", c_files("core", "include"), ids=name_of)
def test_core_includes(path: Path) -> None:
    for include in includes(path):
        header = include[1:-1]
        assert not INTRINSICS.fullmatch(header), include
        assert header != "iostream"
        assert not re.match(r"(torch|ATen|c10|Python|pybind11|onnx)", header), include


@pytest.mark.parametrize("path", c_files("python", "onnx"), ids=name_of)
def test_binding_includes(path: Path) -> None:
    for include in includes(path):
        header = include[1:-1]
        assert not re.search(r"kernels/|simd/|torch|ATen|c10/", header), include
        other = "onnx" if "python" in path.parts else "python"
        assert not header.startswith(f"{other}/"), include


# What the operators for ONNX Runtime need beside standard C++: the CPUs that a process may use.
SYSTEM_HEADERS = {"sched.h"}


@pytest.mark.parametrize("path", c_files("onnx"), ids=name_of)
def test_onnx_includes(path: Path) -> None:
    for include in includes(path):
        header = include[1:-1]
        if include.startswith('"'):
            assert header == "feinwerk/feinwerk.h" or header.startswith("onnx/"), include
        else:
            standard = re.fullmatch(r"[a-z_]+", header)
            assert standard or header in SYSTEM_HEADERS, include


@pytest.mark.parametrize("path", sources(*SOURCE_SUFFIXES), ids=name_of)
def test_every_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES, f"{name_of(path)}: more than {MAX_LINES} lines"
    if not text.strip():
        return
    if path.suffix in (".py", ".pyi"):
        opening = ast.get_docstring(ast.parse(text)) or ""
        if not opening and text.startswith("#"):
            opening = text.partition("\n")[0].lstrip("#! ")
    else:
        opening = re.sub(r"^[/*\s]+", "", text) if text.startswith(("//", "/*")) else ""
    assert re.search(r"\w+ \w+", opening.partition("\n\n")[0]), "open with a sentence"


@pytest.mark.parametrize("path", sources(*SOURCE_SUFFIXES), ids=name_of)
def test_no_unnamed_things(path: Path) -> None:
    assert path.stem not in ("utils", "helpers", "common", "misc"), "name the thing"
    if path != Path(__file__).resolve():
        todo = re.search(r"\b(TODO|FIXME|XXX)\b(?!.*(#\d+|\d+\.\d+))", path.read_text())
        assert not todo, "TODO needs an issue or a version"
