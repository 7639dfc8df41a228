"""The C tests on CPUs that this machine is not: older x86-64 and 64-bit Arm, under qemu-user."""

import platform
import shutil
from pathlib import Path

import cbuild
import pytest

x86_only = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="needs an x86-64 machine (it builds for this one)"
)


def emulator(machine: str) -> str:
    found = shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")
    if not found:
        pytest.skip(f"needs qemu-{machine} (Debian: qemu-user-static)")
    return found


def check(result, expected: str) -> None:
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


@pytest.fixture(scope="session")
def folder() -> Path:
    return cbuild.build("tests")


@pytest.fixture(scope="session")
def arm_folder() -> Path:
    if not shutil.which("aarch64-linux-gnu-g++"):
        pytest.skip("needs a cross compiler (Debian: g++-aarch64-linux-gnu)")
    return cbuild.build(
        "aarch64",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )


@x86_only
@pytest.mark.parametrize(
    ("cpu", "isa"), [("Nehalem", "scalar"), ("Haswell", "avx2")], ids=["Nehalem", "Haswell"]
)
def test_older_x86(folder: Path, cpu: str, isa: str) -> None:
    qemu = emulator("x86_64")
    check(cbuild.run(qemu, "-cpu", cpu, folder / "test_abi", "--isa"), isa)
    check(cbuild.run(qemu, "-cpu", cpu, folder / "test_abi", "--small"), "checks passed")


def test_arm_with_and_without_its_extensions(arm_folder: Path) -> None:
    qemu = emulator("aarch64")
    check(cbuild.run(qemu, "-cpu", "max", arm_folder / "test_abi", "--isa"), "neon")
    # The Cortex-A53 has neither fp16 arithmetic nor the dot product.
    check(cbuild.run(qemu, "-cpu", "cortex-a53", arm_folder / "test_abi", "--isa"), "scalar")


def test_arm_values(arm_folder: Path) -> None:
    program = arm_folder / "test_abi"
    check(cbuild.run(emulator("aarch64"), "-cpu", "max", program, "--small"), "checks passed")


@pytest.mark.parametrize("isa", ["scalar", "neon"])
@pytest.mark.parametrize("what", ["simd_words", "dynamic_codes"])
def test_arm_words_and_codes(arm_folder: Path, what: str, isa: str) -> None:
    program = arm_folder / f"test_{what}_{isa}"
    check(cbuild.run(emulator("aarch64"), "-cpu", "max", program), f"{isa}: ")


@pytest.mark.full
def test_arm_at_length(arm_folder: Path) -> None:
    qemu = emulator("aarch64")
    check(cbuild.run(qemu, "-cpu", "max", arm_folder / "test_abi"), "checks passed")
    check(cbuild.run(qemu, "-cpu", "max", arm_folder / "fuzz", 40), "cases passed")
