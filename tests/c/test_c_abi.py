"""Builds and runs the C11 test of the C ABI and the fuzz driver; checks the kernel objects."""

import re
import shutil
from pathlib import Path

import cbuild
import pytest


@pytest.fixture(scope="session")
def folder() -> Path:
    return cbuild.build("tests")


def active_isa(folder: Path, **environment: str) -> str:
    result = cbuild.run(folder / "test_abi", "--isa", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_op_and_every_error(folder: Path) -> None:
    result = cbuild.run(folder / "test_abi")
    assert result.returncode == 0, result.stderr
    assert "checks passed" in result.stdout


@pytest.mark.parametrize(
    "iterations", [40, pytest.param(300, marks=pytest.mark.full)], ids=["short", "long"]
)
def test_fuzz(folder: Path, iterations: int) -> None:
    result = cbuild.run(folder / "fuzz", iterations, iterations)
    assert result.returncode == 0, result.stderr


@pytest.mark.full
def test_more_rows_than_the_workspace_holds(folder: Path) -> None:
    result = cbuild.run(folder / "test_abi", "--large")
    assert result.returncode == 0, result.stderr


def test_environment_forces_an_isa(folder: Path) -> None:
    isas = cbuild.run(folder / "test_abi", "--isas").stdout.split()
    assert "scalar" in isas
    assert active_isa(folder) == isas[-1]
    for isa in isas:
        assert active_isa(folder, FEINWERK_ISA=isa) == isa


def test_unknown_isa_is_an_error(folder: Path) -> None:
    result = cbuild.run(folder / "test_abi", FEINWERK_ISA="sse9")
    assert result.returncode == 1
    assert re.search(r"must be one of scalar.*got sse9", result.stderr)


def test_every_word_of_every_isa(folder: Path) -> None:
    isas = cbuild.run(folder / "test_abi", "--isas").stdout.split()
    assert isas[0] == "scalar"
    for isa in isas:
        result = cbuild.run(folder / f"test_simd_words_{isa}")
        assert result.returncode == 0, f"{isa}: {result.stdout}{result.stderr}"
        assert f"{isa}: " in result.stdout
        assert "checks passed" in result.stdout


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--all",), marks=pytest.mark.full)], ids=["some", "all"]
)
def test_every_code_of_every_isa(folder: Path, flags: tuple[str, ...]) -> None:
    isas = cbuild.run(folder / "test_abi", "--isas").stdout.split()
    for isa in isas:
        result = cbuild.run(folder / f"test_dynamic_codes_{isa}", *flags)
        assert result.returncode == 0, f"{isa}: {result.stdout}{result.stderr}"
        assert "checks passed" in result.stdout


def test_examples_of_the_docs_run(folder: Path, tmp_path: Path) -> None:
    # tests/test_docs.py compiles them; here they are linked with the core and run.
    compiler = shutil.which("cc")
    assert compiler, "CMake has found one"
    text = (cbuild.ROOT / "docs" / "c_api.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```c\n(.*?)^```", text, re.M | re.S)
    assert len(examples) == 2
    for i, source in enumerate(examples):
        file, program = tmp_path / f"example_{i}.c", tmp_path / f"example_{i}"
        file.write_text(source)
        include = f"-I{cbuild.ROOT / 'csrc' / 'include'}"
        libraries = (folder / "libfeinwerk_core.a", "-lstdc++", "-lm")
        built = cbuild.run(compiler, "-std=c11", include, file, *libraries, "-o", program)
        assert built.returncode == 0, built.stderr
        result = cbuild.run(program)
        assert result.returncode == 0, result.stderr
        promised = re.findall(r"// -> (.*)$", source, re.M)
        printed = result.stdout.splitlines()
        assert printed
        assert not promised or printed == promised


def object_symbols(path: Path) -> list[tuple[str, str]]:
    """(type, name) of every symbol of an object file."""
    nm = shutil.which("nm")
    assert nm, "nm comes with the compiler"
    lines = cbuild.run(nm, "-P", path).stdout.splitlines()
    return [(line.split()[1], line.split()[0]) for line in lines]


def test_kernel_objects_hold_no_weak_symbol(folder: Path) -> None:
    # The linker keeps one copy of a weak symbol for the whole program: were it the one compiled
    # with AVX-512, a CPU without it would stop at an illegal instruction.
    objects = sorted(folder.glob("CMakeFiles/feinwerk_kernels_*.dir/**/*.o"))
    assert len(objects) >= 2
    for path in objects:
        weak = [name for kind, name in object_symbols(path) if kind in "WVwvu"]
        assert not weak, f"{path.name} in {path.parts[-4]}: {weak}"


def test_kernel_objects_call_nothing_but_memory_functions(folder: Path) -> None:
    # No allocation, no threads, no standard library: a kernel is arithmetic on what it is given.
    allowed = {"memcpy", "memset", "memmove", "memcmp", "_GLOBAL_OFFSET_TABLE_"}
    for path in sorted(folder.glob("CMakeFiles/feinwerk_kernels_*.dir/**/*.o")):
        isa = path.relative_to(folder / "CMakeFiles").parts[0][len("feinwerk_kernels_") : -4]
        wanted = {name for kind, name in object_symbols(path) if kind == "U"}
        own = re.compile(rf"_ZNK?8feinwerk{len(isa)}{isa}")
        foreign = {name for name in wanted - allowed if not own.match(name)}
        assert not foreign, f"{path.name} for {isa}: {sorted(foreign)}"
