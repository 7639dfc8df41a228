"""The machine: its name, what it can do at most, and the versions of everything that was measured.

The ceilings come from ceilings.cpp, compiled once with the system compiler. Without a compiler the
bandwidth is taken from torch and no arithmetic peak is known.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.harness import Candidate

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
PACKAGES = (
    "torch",
    "bitsandbytes",
    "peft",
    "transformers",
    "onnxruntime",
    "onnx",
    "numpy",
    "pytest-benchmark",
)
STREAM_BYTES = 256 << 20  # one pass of the memory probe: beyond any cache measured so far
PEAK_SECONDS = 4e-3
QUIET_SHARE = 0.1  # of all cores: a case that others disturbed more is measured again by --resume

# Units of arithmetic that an ISA of ours may use, per activation dtype; the fastest is the limit.
UNITS = {
    "avx2": ("fma256",),
    "avx512": ("fma512",),
    "avx512_vnni": ("fma512",),
    "avx512_bf16": ("fma512", "bf16_dot"),
    "amx": ("fma512", "bf16_dot", "amx_bf16"),
}
REDUCED_PRECISION = ("bf16_dot", "amx_bf16")  # not for fp32 activations
UNIT_NAMES = {
    "fma256": "fp32 FMA, 256 bit",
    "fma512": "fp32 FMA, 512 bit",
    "bf16_dot": "AVX512-BF16 dot",
    "int8_dot": "AVX512-VNNI int8 dot",
    "amx_bf16": "AMX bf16 tiles",
}


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


def features() -> list[str]:
    """The instruction-set extensions that matter here, in the CPU's own words."""
    flags = _cpuinfo("flags").split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return [flag for flag in wanted if flag in flags]


def cache_bytes() -> int:
    """Size of the last-level cache as the system reports it; 32 MiB when it does not."""
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG])", entry.read_text().strip()).groups()
        sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}[unit])
    return max(sizes) or 32 << 20


def name() -> str:
    """The machine's name in file names: CPU model, cores and, as models hide it, AMX."""
    model = re.sub(r"\((R|TM)\)|CPU|@.*", "", _cpuinfo("model name") or platform.processor())
    words = [*model.split(), str(os.cpu_count()), "cores"]
    if "amx_bf16" in features():
        words.append("amx")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def describe() -> dict[str, object]:
    """What a reader must know about the machine."""
    return {
        "name": name(),
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "features": features(),
        "virtual": "hypervisor" in _cpuinfo("flags").split(),
        "last_level_cache_bytes": cache_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The commit measured, with +dirty when sources of the library differ from it."""
    changed = _git("status", "--porcelain", "--", "csrc", "python")
    return (_git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+dirty" if changed else "")


def run_facts() -> dict[str, object]:
    """Date, commit and versions of one run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions,
        "load_average": round(os.getloadavg()[0], 2),
    }


class OtherLoad:
    """What share of all cores other processes (and the hypervisor) used since it was made."""

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        """Busy seconds of all cores without this process's own, and the clock."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0, time.perf_counter()
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time(), time.perf_counter()

    def share(self) -> float:
        """Between 0 and 1."""
        busy, now = self._read()
        seconds = (now - self.start[1]) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - self.start[0]) / max(seconds, 1e-9)))


def wait_until_quiet(patience: float, share: float = QUIET_SHARE) -> None:
    """Wait at most `patience` seconds for half a second in which others use less than `share`."""
    deadline = time.perf_counter() + patience
    while time.perf_counter() < deadline:
        load = OtherLoad()
        time.sleep(0.5)
        if load.share() < share:
            return


@functools.cache
def probe() -> ctypes.CDLL | None:
    """ceilings.cpp as a loaded library, or None without a compiler."""
    source = Path(__file__).with_name("ceilings.cpp")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    tag = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    library = BUILD / f"ceilings-{tag}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}.tmp")
        command = [compiler, "-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", str(source)]
        if subprocess.run([*command, "-o", str(fresh)], check=False).returncode != 0:
            return None
        fresh.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.ceilings_stream.restype = ctypes.c_double
    loaded.ceilings_stream.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    loaded.ceilings_arithmetic.restype = ctypes.c_double
    loaded.ceilings_arithmetic.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int64]
    return loaded


def stream_seconds(threads: int, read_bytes: int, write_bytes: int) -> float:
    """Seconds to move that traffic once, in the native probe or with torch."""
    library = probe()
    if library is not None:
        return float(library.ceilings_stream(threads, read_bytes, write_bytes))
    source, target = torch.ones(max(read_bytes, 4) // 4), torch.empty(max(write_bytes, 4) // 4)

    def move() -> None:
        if read_bytes:
            source.sum()
        if write_bytes:
            target.fill_(1.0)

    move()
    return Candidate("torch", [move]).run(1)


def memory_limit(read_bytes: int, write_bytes: int, threads: int, cold: bool = True) -> Candidate:
    """The machine moving an operation's traffic: a candidate whose time is the memory limit.

    Cold, it streams through buffers beyond the cache in the operation's read:write mix and scales
    the time; warm, it moves just the operation's bytes, again and again.
    """
    total = read_bytes + write_bytes
    scale = max(1.0, STREAM_BYTES / total) if cold else 1.0
    reads, writes = (int(part * scale) for part in (read_bytes, write_bytes))

    def clock(calls: int) -> float:
        if cold:
            return stream_seconds(threads, reads, writes) / scale * calls
        return sum(stream_seconds(threads, reads, writes) for _ in range(calls))

    return Candidate("limit: memory", clock=clock)


def arithmetic(unit: str, threads: int, seconds: float = PEAK_SECONDS) -> float:
    """Operations a second of one unit, 0 where the CPU lacks it; about `seconds` of work."""
    library = probe()
    if library is None:
        return 0.0
    rate = float(library.ceilings_arithmetic(unit.encode(), threads, 1000))
    if not rate:
        return 0.0
    per_step = rate_step(unit)
    steps = max(1000, int(rate * seconds / per_step / threads))
    return float(library.ceilings_arithmetic(unit.encode(), threads, steps))


def rate_step(unit: str) -> int:
    """Operations in one step of a unit, as ceilings.cpp counts them: sets the probe's length."""
    steps = {"fma256": 192, "fma512": 384, "bf16_dot": 768, "int8_dot": 1536, "amx_bf16": 65536}
    return steps[unit]


def arithmetic_limit(unit: str, operations: float, threads: int) -> Candidate:
    """The machine doing an operation's arithmetic on one unit: its time is the limit."""

    def clock(calls: int) -> float:
        return operations * calls / arithmetic(unit, threads)

    return Candidate(f"limit: {UNIT_NAMES[unit]}", clock=clock)


def units(isa: str, dtype: torch.dtype) -> list[str]:
    """Units that a kernel of this ISA may use for activations of this dtype, on this CPU."""
    names = UNITS.get(isa, ())
    if dtype != torch.bfloat16:
        names = tuple(unit for unit in names if unit not in REDUCED_PRECISION)
    return [unit for unit in names if arithmetic(unit, 1, 1e-4) > 0]


def roofline(
    values: dict[str, float], isa: str, dtype: str, reads: int, writes: int, operations: float
) -> tuple[str, float]:
    """(what limits an operation, the seconds it takes at least) at these measured ceilings.

    Args:
        values: from ceilings().
        isa: of the kernels.
        dtype: of the activations, as in plan.Case.
        reads: bytes read.
        writes: bytes written.
        operations: floating-point operations.
    """
    memory = reads / values["read_gbps"] * 1e-9 + writes / values["write_gbps"] * 1e-9
    allowed = [u for u in UNITS.get(isa, ()) if dtype == "bf16" or u not in REDUCED_PRECISION]
    rates = {unit: values[f"{unit}_gops"] for unit in allowed if f"{unit}_gops" in values}
    if not rates or not operations:
        return "memory", memory
    unit = max(rates, key=lambda name: rates[name])
    arithmetic_seconds = operations / rates[unit] * 1e-9
    if arithmetic_seconds > memory:
        return UNIT_NAMES[unit], arithmetic_seconds
    return "memory", memory


def ceilings(threads: int, passes: int = 5) -> dict[str, float]:
    """Best of several passes: GB/s for reading, copying and writing, G operations/s per unit."""
    half = STREAM_BYTES // 2
    traffic = {
        "read_gbps": (STREAM_BYTES, 0),
        "write_gbps": (0, STREAM_BYTES),
        "copy_gbps": (half, half),
    }
    result = {}
    for key, (reads, writes) in traffic.items():
        best = min(stream_seconds(threads, reads, writes) for _ in range(passes))
        result[key] = (reads + writes) / best * 1e-9
    cached = min(1 << 23, cache_bytes() // 4)
    best = min(stream_seconds(threads, cached, 0) for _ in range(4 * passes))
    result["read_cached_gbps"] = cached / best * 1e-9
    for unit in UNIT_NAMES:
        rate = max(arithmetic(unit, threads) for _ in range(passes))
        if rate:
            result[f"{unit}_gops"] = rate * 1e-9
    return result
