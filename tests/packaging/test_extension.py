"""The built extension and library: what they need, what they show, and how they load."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import feinwerk

LIBRARY = Path(feinwerk.__file__).parent / "onnx" / "libfeinwerk_onnx.so"
MODULES = sorted(Path(feinwerk.__file__).parent.glob("_C*.so"))


@pytest.fixture
def module() -> Path:
    tag = sys.implementation.cache_tag  # cpython-311
    found = [path for path in MODULES if tag in path.name]
    if not found:
        pytest.skip("needs the native extension")
    return found[0]


def tool(*command: object) -> str:
    assert shutil.which(str(command[0])), f"{command[0]} comes with the compiler"
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def library(module: Path) -> Path:
    assert LIBRARY.is_file(), "built together with the module"
    return LIBRARY


@pytest.mark.parametrize("built", ["module", "library"])
def test_it_needs_the_c_library_only(built: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(built)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", module)))
    system = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= system
    assert "RUNPATH" not in tool("readelf", "-d", module)


@pytest.mark.parametrize("built", ["module", "library"])
def test_it_asks_for_no_cxx_or_openmp_symbol(built: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(built)
    # _ZGTt*: weak hooks of transactional memory in the C++ run time, bound to nothing.
    undefined = tool("nm", "-D", "--undefined-only", module).replace("_ZGTt", "")
    assert not re.findall(r"\S*(?:GLIBCXX|CXXABI|GOMP|OMP)\S*|\b_Z\S+", undefined)


def test_it_exports_its_init_function_and_the_c_abi_only(module: Path) -> None:
    lines = tool("nm", "-D", "--defined-only", module).splitlines()
    names = {line.split()[-1].partition("@")[0] for line in lines}
    assert "PyInit__C" in names
    assert {name for name in names if not name.startswith("feinwerk_")} == {"PyInit__C"}


def test_the_library_exports_one_function_and_knows_no_python(library: Path) -> None:
    lines = tool("nm", "-D", "--defined-only", library).splitlines()
    assert {line.split()[-1].partition("@")[0] for line in lines} == {"RegisterCustomOps"}
    undefined = tool("nm", "-D", "--undefined-only", library)
    assert not re.findall(r"\b(?:Py|_Py|Ort|c10|at)\w*", undefined)
    # Sessions refer to what it has registered.
    assert "NODELETE" in tool("readelf", "-d", library)


def test_without_a_native_part_the_library_is_missed_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from feinwerk.onnx import library as home

    monkeypatch.setattr(home, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(RuntimeError, match=r"library_path: libfeinwerk_onnx.so must be built, got"):
        home.library_path()


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("feinwerk._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""

LOADS = (
    LOAD
    + """
libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(sorted(name.rsplit("/")[-1] for name in libraries if "gomp" in name or "stdc++" in name))
"""
)


def test_it_loads_without_torch_openmp_or_libstdcxx(module: Path) -> None:
    assert tool(sys.executable, "-c", LOADS, module).strip() == "[]"


BESIDE_TORCH = """
import torch
import feinwerk
weight = feinwerk.NF4Weight.from_dense(torch.randn(512, 512))
torch.set_num_threads(2)
weight.linear(torch.randn(64, 512))
paths = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
print(len({path for path in paths}))
try:
    weight.linear(torch.randn(64, 511))
except ValueError as error:
    print(error)
"""


def test_one_openmp_and_working_exceptions_beside_torch(module: Path) -> None:
    lines = tool(sys.executable, "-W", "error", "-c", BESIDE_TORCH).splitlines()
    assert lines[0] == "1"
    assert lines[1].startswith("nf4_linear: x must ")


# A C library in which there is no OpenMP runtime to be had.
NO_OPENMP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
void* dlopen(const char* name, int flags) {
  void* (*next)(const char*, int) = (void* (*)(const char*, int))dlsym(RTLD_NEXT, "dlopen");
  return name && strstr(name, "gomp") ? 0 : next(name, flags);
}
"""

# 96 x 64 weights of 1: every block's scale is 1 and every code 15.
SERIAL = (
    LOAD
    + """
import ctypes
count = 96 * 64
weight = (ctypes.c_float * count)(*[1.0] * count)
packed, absmax = (ctypes.c_uint8 * (count // 2))(), (ctypes.c_float * 96)()
address = ctypes.addressof
module.nf4_quantize(address(weight), 0, count, 64, 0, False, address(packed), count // 2,
                    address(absmax), 96, 2)
print(set(packed), set(absmax))
print(module.openmp())
"""
)


def test_without_an_openmp_runtime_it_runs_serially_and_says_so(
    module: Path, tmp_path: Path
) -> None:
    source, shim = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(NO_OPENMP)
    tool("gcc", "-shared", "-fPIC", "-o", shim, source)
    preload = ["env", f"LD_PRELOAD={shim}", sys.executable, "-c"]
    lines = tool(*preload, SERIAL, module).splitlines()
    assert lines == [
        "{255} {1.0}",
        "serial: no OpenMP runtime (libgomp.so.1) could be loaded",
    ]
    # The same program with the runtime there: what was shown above is the runtime's absence.
    assert "serial" not in tool(sys.executable, "-c", SERIAL, module)
