"""Types of the native module `_C` (csrc/python/module.cpp): addresses and sizes in, None out."""

_Weight = tuple[int, int, int, int, int, int, int, int, int, int, int, int]

def version() -> str: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def force_isa(name: str | None) -> None: ...
def openmp() -> str: ...
def advise_huge_pages(address: int, size: int) -> None: ...
def nf4_quantize(
    weight: int,
    dtype: int,
    count: int,
    blocksize: int,
    rule: int,
    allow_non_finite: bool,
    packed: int,
    packed_bytes: int,
    absmax: int,
    absmax_count: int,
    threads: int,
) -> None: ...
def nf4_dequantize(weight: _Weight, out: int, dtype: int, out_count: int, threads: int) -> None: ...
def nf4_linear(
    weight: _Weight,
    x: int,
    y: int,
    dtype: int,
    rows: int,
    bias: int,
    bias_dtype: int,
    compute: int,
    workspace: int,
    workspace_bytes: int,
    threads: int,
) -> None: ...
def nf4_linear_backward(
    weight: _Weight,
    grad_y: int,
    grad_x: int,
    dtype: int,
    rows: int,
    workspace: int,
    workspace_bytes: int,
    threads: int,
) -> None: ...
def nf4_embedding(
    weight: _Weight,
    indices: int,
    indices_count: int,
    out: int,
    dtype: int,
    out_count: int,
    threads: int,
) -> None: ...
def blockwise_quantize(
    x: int,
    count: int,
    blocksize: int,
    codebook: int,
    rule: int,
    center: bool,
    codes: int,
    absmax: int,
    absmax_count: int,
    offset: int,
    threads: int,
) -> None: ...
def blockwise_dequantize(
    codes: int,
    count: int,
    blocksize: int,
    codebook: int,
    absmax: int,
    absmax_count: int,
    offset: int,
    out: int,
    threads: int,
) -> None: ...
def nf4_linear_workspace(
    rows: int, n: int, k: int, blocksize: int, dtype: int, compute: int, threads: int
) -> int: ...
def nf4_linear_backward_workspace(
    rows: int, n: int, k: int, blocksize: int, dtype: int, threads: int
) -> int: ...
