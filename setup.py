"""Builds feinwerk._C and libfeinwerk_onnx.so with CMake; the rest is in pyproject.toml.

FEINWERK_NO_NATIVE=1   leave both out: a pure-Python package with the reference backend
FEINWERK_WERROR=1      compiler warnings are errors (CI)
CMAKE_ARGS             further arguments for CMake's configure step
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PURE = os.environ.get("FEINWERK_NO_NATIVE", "0") not in ("", "0")
LIBRARY = Path("onnx") / "libfeinwerk_onnx.so"  # inside the package
INSTEAD = "or set FEINWERK_NO_NATIVE=1 to install the pure-Python library"


def find_compiler() -> str:
    """The C++ compiler CMake will use, or the one sentence that says what to install."""
    named = os.environ.get("CXX", "").split()
    for name in named[:1] or ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    missing = f"CXX={named[0]} is not a program" if named else "no C++ compiler was found"
    raise SystemExit(f"feinwerk: {missing}; install one (on Debian: apt install g++) {INSTEAD}.")


def find_python_headers() -> None:
    """Fail with one sentence when Python.h is missing."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise SystemExit(
            "feinwerk: the Python headers (Python.h) were not found; install them "
            f"(on Debian: apt install python3-dev) {INSTEAD}."
        )


def find_tool(name: str) -> str:
    """A program that a build requirement brings: beside this Python, else on PATH (isolation)."""
    beside = os.path.dirname(sys.executable)
    path = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if not path:
        raise SystemExit(f"feinwerk: {name} was not found; pip install {name}.")
    return path


def put(source: Path, target: Path) -> None:
    """Copy by renaming into place: a process that has the old file loaded keeps its pages."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(target.name + ".new")
    shutil.copy2(source, staged)
    staged.replace(target)


class CMakeBuild(build_ext):
    """Configures and builds in a build folder that persists, so that a second build is short."""

    def run(self) -> None:
        """Check for what the build needs, then build."""
        find_python_headers()
        find_compiler()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and copy module and library to where setuptools wants them."""
        import pybind11

        # self.build_temp is a fresh temporary folder in editable mode; this one stays.
        name = f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = ROOT / "build" / name
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        werror = os.environ.get("FEINWERK_WERROR", "0") not in ("", "0")
        # Given on every run: with build isolation these paths change from build to build.
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFEINWERK_WERROR={'ON' if werror else 'OFF'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        targets = ["_C", "feinwerk_onnx"]
        for command in (configure, [cmake, "--build", str(build), "--target", *targets]):
            result = subprocess.run(command, check=False)
            if result.returncode:
                raise SystemExit(f"feinwerk: the native build failed in {build}; see above.")
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        put(build / module.name, module)
        put(build / LIBRARY.name, module.parent / LIBRARY)

    def copy_extensions_to_source(self) -> None:
        """Copy from the build's package folder to the source's, the library as well."""
        super().copy_extensions_to_source()
        put(Path(self.build_lib) / "feinwerk" / LIBRARY, ROOT / "python" / "feinwerk" / LIBRARY)


class FreshBuildPy(build_py):
    """build_py into an empty folder: setuptools would ship modules deleted since the last build."""

    def run(self) -> None:
        """Empty the staging folder, then copy."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[] if PURE else [Extension("feinwerk._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy},
)
