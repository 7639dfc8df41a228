"""Every rejection of the adapter ops by its message, on real tensors and on fakes alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import feinwerk
from feinwerk import _native, testing

N, K, R, M = 6, 96, 2, 3
NF4 = testing.make_weight(N, K)
NESTED = testing.make_weight(N, K, double_quant=True)
X, W, A, B = torch.ones(M, K), torch.ones(N, K), torch.ones(R, K), torch.ones(N, R)
ONES, INDEX, SEED = torch.ones(N), torch.tensor([0, -1, 1]), torch.tensor(1)

BASE: dict[str, dict[str, Any]] = {
    "lora_linear": {"x": X, "weight": W, "lora_A": A, "lora_B": B},
    "dora_linear": {"x": X, "weight": W, "lora_A": A, "lora_B": B, "magnitude": ONES,
                    "base_norm": ONES},
    "grouped_lora_linear": {"x": X, "weight": W, "lora_A": [A, A[:1]], "lora_B": [B, B[:, :1]],
                            "adapter_index": INDEX, "scaling": [1.0, 2.0]},
}  # fmt: skip
FLOATS = "be torch.float32, torch.bfloat16 or torch.float16"
FITS = "weight must have shape (N, K) = (6, 96) as lora_B and lora_A say"
SIZES = "be one of 32, 64, 128, 256, 512, 1024, 2048, 4096"
Cases = list[tuple[dict[str, Any], type[Exception], str]]

# Rules that the three functions share; the registered op's name is in front of its own.
SHARED: Cases = [
    ({"x": "x"}, TypeError, "x must be a torch.Tensor, got str"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"x": X.double()}, TypeError, f"x must {FLOATS}, got torch.float64"),
    ({"x": X[:, 1:]}, ValueError, "x must have last dimension K = 96, got (3, 95)"),
    ({"weight": W.double()}, TypeError, f"weight must {FLOATS}, got torch.float64"),
    ({"weight": W[:, 1:]}, ValueError, f"{FITS}, got (6, 95)"),
    ({"weight": W[1:]}, ValueError, f"{FITS}, got (5, 96)"),
    ({"weight": W.flatten()}, ValueError, f"{FITS}, got (576,)"),
    ({"weight": NF4.packed}, TypeError, f"weight must {FLOATS}, got torch.uint8"),
    (
        {"weight": NF4.packed[1:], "absmax": NF4.absmax},
        ValueError,
        "weight must have 288 elements, got 287",
    ),
    (
        {"weight": NF4.packed, "absmax": NF4.absmax[1:]},
        ValueError,
        "absmax must have 9 elements, got 8",
    ),
    (
        {"weight": NF4.packed, "absmax": NF4.absmax, "blocksize": 65},
        ValueError,
        f"blocksize must {SIZES}, got 65",
    ),
    (
        {"weight": NESTED.packed, "absmax": NESTED.absmax, "nested_absmax": NESTED.nested[0]},
        ValueError,
        "nested_codebook, nested_offset must be given together with the other nested tensors, or "
        "none of the three, got None",
    ),
    (
        {"weight": W, "absmax": NF4.absmax},
        TypeError,
        "weight must be torch.uint8, got torch.float32",
    ),
    ({"bias": torch.ones(5)}, ValueError, "bias must have shape (6,), got (5,)"),
    ({"bias": torch.ones(6, 1)}, ValueError, "bias must have shape (6,), got (6, 1)"),
    ({"bias": ONES.int()}, TypeError, f"bias must {FLOATS}, got torch.int32"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in [0, 1), got nan"),
    ({"compute": "int4"}, ValueError, 'compute must be "exact" or "int8", got \'int4\''),
    (
        {"compute": "int8"},
        ValueError,
        "compute must be \"exact\" for a dense weight, got 'int8'",
    ),
]
SINGLE: Cases = [
    ({"lora_A": 1.0}, TypeError, "lora_A must be a torch.Tensor, got float"),
    ({"lora_B": [B]}, TypeError, "lora_B must be a torch.Tensor, got list"),
    ({"lora_A": A.double()}, TypeError, f"lora_A must {FLOATS}, got torch.float64"),
    ({"lora_B": B.int()}, TypeError, f"lora_B must {FLOATS}, got torch.int32"),
    ({"lora_B": B[:, :1]}, ValueError, "lora_B must have shape (N = 6, r = 2), got (6, 1)"),
    ({"lora_A": A[:0], "lora_B": B[:, :0]}, ValueError,
     "lora_A must have shape (r, K = 96), got (0, 96)"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have 1 to 4 dimensions, got 0"),
    ({"x": torch.ones(1, 1, 1, 1, K)}, ValueError, "x must have 1 to 4 dimensions, got 5"),
    ({"scaling": float("inf")}, ValueError, "scaling must be finite, got inf"),
    ({"scaling": float("nan")}, ValueError, "scaling must be finite, got nan"),
    (
        {"scaling": torch.ones(2)},
        ValueError,
        "scaling must be a float or a 0-dim tensor, got 1 dimensions",
    ),
]  # fmt: skip
OWN: dict[str, Cases] = {
    "lora_linear": [
        ({"lora_A": A[0]}, ValueError, "lora_A must have shape (r, K = 96), got (96,)"),
        ({"lora_bias": torch.ones(1)}, ValueError, "lora_bias must have shape (6,), got (1,)"),
        ({"lora_bias": ONES.int()}, TypeError, f"lora_bias must {FLOATS}, got torch.int32"),
    ],
    "dora_linear": [
        ({"magnitude": 1.0}, TypeError, "magnitude must be a torch.Tensor, got float"),
        ({"magnitude": torch.ones(5)}, ValueError, "magnitude must have shape (6,), got (5,)"),
        ({"magnitude": torch.ones(0)}, ValueError, "magnitude must have shape (6,), got (0,)"),
        ({"magnitude": ONES.double()}, TypeError, f"magnitude must {FLOATS}, got torch.float64"),
        ({"lora_A": A[0]}, ValueError, "lora_A must have 2 dimensions, got 1"),
        ({"lora_B": B[0]}, ValueError, "lora_B must have 2 dimensions, got 1"),
        (
            {"base_norm": torch.ones(5)},
            ValueError,
            "base_norm must be float32 of shape (6,), got torch.float32 (5,)",
        ),
        (
            {"base_norm": ONES.half()},
            ValueError,
            "base_norm must be float32 of shape (6,), got torch.float16 (6,)",
        ),
        (
            {"weight_norm": torch.ones(5)},
            ValueError,
            "weight_norm must have shape (6,), got (5,)",
        ),
    ],
    "grouped_lora_linear": [
        ({"scaling": [1.0]}, ValueError,
         "lora_A, lora_B and scaling must be as many, got 2, 2 and 1"),
        ({"lora_A": [], "lora_B": [], "scaling": []}, ValueError,
         "lora_A, lora_B and scaling must be as many, got 0, 0 and 0"),
        ({"lora_A": [A, 1]}, TypeError, "lora_A must be a torch.Tensor, got int"),
        ({"lora_A": [A, A[:1, 1:]]}, ValueError, "lora_A must have shape (r, K = 96), got (1, 95)"),
        ({"lora_B": [B, B]}, ValueError, "lora_B must have shape (N = 6, r = 1), got (6, 2)"),
        ({"lora_B": [B, B[1:, :1]]}, ValueError,
         "lora_B must have shape (N = 6, r = 1), got (5, 1)"),
        ({"scaling": [1.0, float("inf")]}, ValueError, "scaling must be finite, got inf"),
        ({"adapter_index": [0, 1, 0]}, TypeError, "adapter_index must be a torch.Tensor, got list"),
        ({"adapter_index": INDEX.int()}, TypeError,
         "adapter_index must be torch.int64, got torch.int32"),
        ({"adapter_index": INDEX[1:]}, ValueError,
         "adapter_index must have shape (3,) or (3,), got (2,)"),
        ({"magnitude": [ONES]}, ValueError, "magnitude must have 2 entries, got 1"),
        ({"magnitude": [torch.ones(5), None]}, ValueError,
         "magnitude must have shape (6,), got (5,)"),
        ({"magnitude": [ONES, ONES], "weight_norm": [ONES, None]}, ValueError,
         "weight_norm must be given for every DoRA adapter or for none, got None for some"),
        ({"magnitude": [ONES, None], "weight_norm": [ONES]}, ValueError,
         "weight_norm must have 2 entries, got 1"),
        ({"magnitude": [ONES, None], "weight_norm": [ONES[1:], None]}, ValueError,
         "weight_norm must have shape (6,), got (5,)"),
    ],
}  # fmt: skip
CASES = [
    (op, *case)
    for op in BASE
    for case in (*SHARED, *(() if op == "grouped_lora_linear" else SINGLE), *OWN[op])
]
# Not on fakes: the values are looked at.
VALUES: Cases = [
    ({"adapter_index": INDEX + 1}, IndexError, "adapter_index must be in [-1, 2), got 0 to 2"),
    ({"adapter_index": INDEX - 1}, IndexError, "adapter_index must be in [-1, 2), got -2 to 0"),
]


def moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    if not isinstance(value, torch.Tensor) or device == "cpu":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def pattern(op: str, message: str) -> str:
    """The registered op checks under its own name."""
    return f"^({op}|lora_linear|row_norms): {re.escape(message)}$"


def ids(value: Any) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("op", "change", "error", "message"), CASES, ids=ids)
def test_rejected(
    op: str, change: dict[str, Any], error: type[Exception], message: str, device: str
) -> None:
    if device == "meta" and op == "grouped_lora_linear":
        device = "cpu"  # sorting looks at the index's values
    arguments = {k: moved(v, device) for k, v in {**BASE[op], **change}.items()}
    with pytest.raises(error, match=pattern(op, message)):
        getattr(feinwerk, op)(**arguments)


@pytest.mark.parametrize(("change", "error", "message"), VALUES, ids=ids)
def test_values_of_the_index(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**BASE["grouped_lora_linear"], **change}
    with pytest.raises(error, match=pattern("grouped_lora_linear", message)):
        feinwerk.grouped_lora_linear(**arguments)


@pytest.mark.parametrize("op", BASE)
def test_the_base_case_is_accepted(op: str) -> None:
    getattr(feinwerk, op)(**BASE[op])
    if op != "grouped_lora_linear":
        getattr(feinwerk, op)(**{k: moved(v, "meta") for k, v in BASE[op].items()})


@pytest.mark.parametrize(
    "seed", [torch.tensor([1]), torch.tensor(1, dtype=torch.int32), torch.tensor(1.0)]
)
@pytest.mark.parametrize("op", BASE)
def test_a_seed_is_a_0_dim_int64(op: str, seed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="seed must be a 0-dim int64 tensor for dropout_p > 0"):
        getattr(feinwerk, op)(**BASE[op], dropout_p=0.1, seed=seed)


@pytest.mark.parametrize("op", BASE)
def test_tensors_on_two_devices(op: str) -> None:
    names = [k for k, v in BASE[op].items() if isinstance(v, torch.Tensor) and k != "x"]
    arguments = {**BASE[op], "bias": ONES}
    for name in (*names, "bias"):
        if name == "adapter_index":
            continue
        changed = {**arguments, name: arguments[name].to("meta")}
        with pytest.raises(ValueError, match=rf": {name} must be on cpu like the other tensors"):
            getattr(feinwerk, op)(**changed)


def test_the_check_runs_in_front_of_the_registered_ops() -> None:
    scaling = torch.ones(1)
    with pytest.raises(ValueError, match="lora_linear: segments must be given for more than one"):
        torch.ops.feinwerk.lora_linear(
            X, W, None, None, None, None, None, [A, A], [B, B], torch.ones(2), None, [], None,
            None, None,
        )  # fmt: skip
    with pytest.raises(ValueError, match="lora_linear: base_norm must be given with magnitude"):
        torch.ops.feinwerk.lora_linear(
            X, W, None, None, None, None, None, [A], [B], scaling, None, [ONES], None, None, None
        )
    weight = (W, None, None, None, None, None, [A], [B], scaling)
    cases: Cases = [
        ({"grad_y": torch.ones(M, 5)}, ValueError, "grad_y must have last dimension N = 6"),
        ({"grad_y": torch.ones(2, N)}, ValueError, "grad_y must be torch.float32 with the rows"),
        ({"grad_y": torch.ones(M, N).half()}, ValueError, "grad_y must be torch.float32 with the"),
        ({"wants": [True]}, ValueError, "wants must have 5 entries, got 1"),
        ({"magnitude": [ONES]}, ValueError, "weight_norm must be given with magnitude, got None"),
        ({"S": torch.ones(M, 1)}, ValueError, r"S must be float32 of shape \(3, 2\), got torch.fl"),
        ({"S": torch.ones(2, R)}, ValueError, r"S must be float32 of shape \(3, 2\), got torch.fl"),
        ({"S": torch.ones(M, R).half()}, ValueError, "S must be float32 of shape"),
        ({"y": torch.ones(M, 5)}, ValueError, r"y must be like grad_y, got torch.float32 \(3, 5\)"),
        ({"y": torch.ones(M, N).half()}, ValueError, "y must be like grad_y, got torch.float16"),
    ]
    for change, error, message in cases:
        values: dict[str, Any] = {"grad_y": torch.ones(M, N), "S": torch.ones(M, R), "y": None}
        values |= {"wants": [True] * 5, "magnitude": [], **change}
        with pytest.raises(error, match=f"lora_linear_backward: {message}"):
            torch.ops.feinwerk.lora_linear_backward(
                values["grad_y"], X, values["S"], values["y"], *weight, None, values["magnitude"],
                None, None, wants=values["wants"],
            )  # fmt: skip


SEGMENTS = (
    [[0, 99], [0, 0]],
    [[0, 2], [1, 3]],
    [[2, 3], [0, 2]],
    [[-1, 2], [2, 3]],
    [[3, 1], [1, 3]],
)


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
@pytest.mark.skipif(not _native.available(), reason="needs the native extension")
def test_segments_that_leave_the_rows(segments: list[list[int]]) -> None:
    rows = torch.tensor(segments)
    with pytest.raises(ValueError, match=r"lora_linear.*: row_begin and row_end must ascend"):
        torch.ops.feinwerk.lora_linear(
            X, W, None, None, None, None, None, [A, A], [B, B], torch.ones(2), rows, [], None, None,
            None,
        )  # fmt: skip


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.skipif(not _native.available(), reason="needs the native extension")
def test_a_scaling_tensor_is_looked_at_by_the_kernel(value: float) -> None:
    with pytest.raises(ValueError, match="lora_linear: scaling must be finite, got"):
        feinwerk.lora_linear(X, W, A, B, scaling=torch.tensor(value))


def test_a_rejection_under_compile_keeps_its_message() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: feinwerk.lora_linear(x, W, A, B), backend="aot_eager")
    with pytest.raises(Exception, match="lora_linear: x must have last dimension K = 96"):
        compiled(torch.ones(2, 95))
