"""Types of the native module `_C` (csrc/python/module.cpp): addresses and sizes in, None out."""

_Weight = tuple[int, int, int, int, int, int, int, int, int, int, int, int]
_Base = tuple[_Weight, int, int]
_Adapter = tuple[int, int, int, float, int, int, int, int, int, bool, int, int, int]

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
def lora_linear(
    weight: _Base,
    x: int,
    y: int,
    dtype: int,
    rows: int,
    bias: int,
    bias_dtype: int,
    compute: int,
    adapters: list[_Adapter],
    s: int,
    s_cols: int,
    seed: int,
    drop_below: int,
    keep_scale: float,
    workspace: int,
    workspace_bytes: int,
    threads: int,
) -> int: ...
def lora_linear_backward(
    weight: _Base,
    grad_y: int,
    x: int,
    y: int,
    dtype: int,
    rows: int,
    bias: int,
    bias_dtype: int,
    adapters: list[_Adapter],
    s: int,
    s_cols: int,
    seed: int,
    drop_below: int,
    keep_scale: float,
    grad_x: int,
    grad_bias: int,
    workspace: int,
    workspace_bytes: int,
    threads: int,
) -> int: ...
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
    row_length: int,
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
    row_length: int,
    codebook: int,
    absmax: int,
    absmax_count: int,
    offset: int,
    out: int,
    threads: int,
) -> None: ...
def adamw_step(
    tensors: list[tuple[int, ...]],
    master: int,
    grad_dtype: int,
    state: int,
    blocksize: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
    seed: int,
    threads: int,
) -> None: ...
def square_sum(
    tensors: list[tuple[int, int, int, int]], limbs: int, limb_count: int, threads: int
) -> None: ...
def nf4_linear_workspace(
    rows: int, n: int, k: int, blocksize: int, dtype: int, compute: int, threads: int
) -> int: ...
def nf4_linear_backward_workspace(
    rows: int, n: int, k: int, blocksize: int, dtype: int, threads: int
) -> int: ...
