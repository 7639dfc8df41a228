"""Every rejection of adamw_step by its message, on real tensors and on fakes alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from feinwerk import adamw_step
from feinwerk.testing.adamw import make_step

SHAPES = ((3, 50), (7,))
FP32 = make_step(SHAPES)
CODED = make_step(SHAPES, states=torch.uint8)
REMAINDER = make_step(SHAPES, master="remainder", states=torch.bfloat16)
STOCHASTIC = make_step(SHAPES, master="stochastic")
FLOATS = "be torch.float32, torch.bfloat16 or torch.float16"
MANY = torch.ones(2)
TURNED = torch.ones(50, 3).t()


def second(name: str, tensor: Any, case: Any = FP32) -> dict[str, Any]:
    """The list of that name with another second entry."""
    old = case.tensors.get(name) or case.options[name]
    return {name: [old[0], tensor]}


def first(name: str, tensor: torch.Tensor, case: Any = FP32) -> dict[str, Any]:
    """The list of that name with another first entry."""
    return {name: [tensor, case.tensors[name][1]]}


CASES: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    # scalars
    (FP32, {"lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
    (FP32, {"lr": torch.nan}, ValueError, "lr must be a finite number of at least 0, got nan"),
    (FP32, {"lr": torch.inf}, ValueError, "lr must be a finite number of at least 0, got inf"),
    (
        FP32,
        {"weight_decay": -0.1},
        ValueError,
        "weight_decay must be a finite number of at least 0, got -0.1",
    ),
    (FP32, {"beta1": 1.0}, ValueError, "beta1 must be in [0, 1), got 1.0"),
    (FP32, {"beta1": -0.1}, ValueError, "beta1 must be in [0, 1), got -0.1"),
    (FP32, {"beta2": 1.5}, ValueError, "beta2 must be in [0, 1), got 1.5"),
    (FP32, {"beta2": torch.nan}, ValueError, "beta2 must be in [0, 1), got nan"),
    (FP32, {"eps": 0.0}, ValueError, "eps must be a finite number above 0, got 0.0"),
    (FP32, {"eps": torch.inf}, ValueError, "eps must be a finite number above 0, got inf"),
    (FP32, {"blocksize": 0}, ValueError, "blocksize must be at least 1, got 0"),
    (FP32, {"blocksize": -64}, ValueError, "blocksize must be at least 1, got -64"),
    # lists
    (FP32, {"grads": FP32.grads[:1]}, ValueError, "grads must have 2 entries, got 1"),
    (FP32, {"exp_avgs": []}, ValueError, "exp_avgs must have 2 entries, got 0"),
    (FP32, {"exp_avg_sqs": []}, ValueError, "exp_avg_sqs must have 2 entries, got 0"),
    (
        FP32,
        {"exp_avg_absmaxes": CODED.exp_avg_absmaxes},
        ValueError,
        "exp_avg_absmaxes must have 0 entries, got 2",
    ),
    (CODED, {"exp_avg_absmaxes": []}, ValueError, "exp_avg_absmaxes must have 2 entries, got 0"),
    (
        CODED,
        {"exp_avg_sq_absmaxes": CODED.exp_avg_absmaxes[:1]},
        ValueError,
        "exp_avg_sq_absmaxes must have 2 entries, got 1",
    ),
    (
        REMAINDER,
        {"remainders": REMAINDER.remainders[:1]},
        ValueError,
        "remainders must have 2 entries, got 1",
    ),
    (FP32, {"steps": [1]}, ValueError, "steps must have 2 entries, got 1"),
    (FP32, {"parameter_ids": [1, 2, 3]}, ValueError, "parameter_ids must have 2 entries, got 3"),
    (FP32, {"first_elements": []}, ValueError, "first_elements must have 2 entries, got 0"),
    # numbers of a parameter
    (FP32, {"steps": [1, 0]}, ValueError, "steps[1] must be in [1, 2^31), got 0"),
    (FP32, {"steps": [2**31, 1]}, ValueError, "steps[0] must be in [1, 2^31), got 2147483648"),
    (FP32, {"parameter_ids": [0, -1]}, ValueError, "parameter_ids[1] must be in [0, 2^31), got -1"),
    (
        FP32,
        {"parameter_ids": [2**31, 1]},
        ValueError,
        "parameter_ids[0] must be in [0, 2^31), got 2147483648",
    ),
    (FP32, {"first_elements": [0, -5]}, ValueError, "first_elements[1] must be at least 0, got -5"),
    # one number in a tensor
    (
        FP32,
        {"clip_coef": MANY},
        ValueError,
        "clip_coef must be one floating-point number, got torch.float32 with 2 elements",
    ),
    (
        FP32,
        {"grad_scale": torch.tensor(2)},
        ValueError,
        "grad_scale must be one floating-point number, got torch.int64 with 1 elements",
    ),
    (
        FP32,
        {"found_inf": torch.ones(0)},
        ValueError,
        "found_inf must be one floating-point number, got torch.float32 with 0 elements",
    ),
    (
        STOCHASTIC,
        {"seed": torch.tensor(1.0)},
        ValueError,
        "seed must be a 0-dim int64 tensor, got torch.float32",
    ),
    (
        STOCHASTIC,
        {"seed": torch.tensor([1, 2])},
        ValueError,
        "seed must be a 0-dim int64 tensor, got torch.int64",
    ),
    # dtypes
    (
        FP32,
        first("params", torch.ones(3, 50, dtype=torch.float16)),
        TypeError,
        "params[0] must be torch.float32 or torch.bfloat16, got torch.float16",
    ),
    (
        STOCHASTIC,
        second("params", torch.ones(7), STOCHASTIC),
        TypeError,
        "params[1] must be torch.bfloat16 like the first of the list, got torch.float32",
    ),
    (
        FP32,
        {"remainders": REMAINDER.remainders},
        TypeError,
        "params[0] must be torch.bfloat16 with remainders, got torch.float32",
    ),
    (
        STOCHASTIC,
        {"seed": None},
        ValueError,
        "params must come with remainders or a seed for stochastic rounding when they are "
        "torch.bfloat16, got neither",
    ),
    (
        FP32,
        second("grads", torch.ones(7, dtype=torch.float64)),
        TypeError,
        f"grads[1] must {FLOATS}, got torch.float64",
    ),
    (
        FP32,
        second("grads", torch.ones(7).half()),
        TypeError,
        "grads[1] must be torch.float32 like the first of the list, got torch.float16",
    ),
    (
        FP32,
        {"exp_avgs": [m.half() for m in FP32.exp_avgs]},
        TypeError,
        "exp_avgs[0] must be torch.float32, torch.bfloat16 or torch.uint8, got torch.float16",
    ),
    (
        FP32,
        second("exp_avgs", torch.ones(7).bfloat16()),
        TypeError,
        "exp_avgs[1] must be torch.float32 like the first of the list, got torch.bfloat16",
    ),
    (
        CODED,
        {"exp_avg_sqs": FP32.exp_avg_sqs},
        TypeError,
        "exp_avg_sqs[0] must be torch.uint8 as exp_avgs[0] is, got torch.float32",
    ),
    # shapes and strides
    (
        FP32,
        second("grads", torch.ones(8)),
        ValueError,
        "grads[1] must have the parameter's shape (7,), got (8,)",
    ),
    (
        FP32,
        first("exp_avgs", torch.ones(150)),
        ValueError,
        "exp_avgs[0] must have the parameter's shape (3, 50), got (150,)",
    ),
    (
        FP32,
        first("exp_avg_sqs", torch.ones(50, 3)),
        ValueError,
        "exp_avg_sqs[0] must have the parameter's shape (3, 50), got (50, 3)",
    ),
    (
        FP32,
        first("params", TURNED),
        ValueError,
        "params[0] must be contiguous, got strides (1, 3)",
    ),
    (
        FP32,
        first("exp_avgs", TURNED),
        ValueError,
        "exp_avgs[0] must be contiguous, got strides (1, 3)",
    ),
    (
        FP32,
        first("exp_avg_sqs", TURNED),
        ValueError,
        "exp_avg_sqs[0] must be contiguous, got strides (1, 3)",
    ),
    # tables
    (
        CODED,
        {"blocksize": 32},
        ValueError,
        "exp_avg_absmaxes[0] must have 6 elements, got 3",
    ),
    (
        CODED,
        second("exp_avg_absmaxes", torch.ones(2), CODED),
        ValueError,
        "exp_avg_absmaxes[1] must have 1 elements, got 2",
    ),
    (
        CODED,
        second("exp_avg_sq_absmaxes", torch.ones(1).double(), CODED),
        TypeError,
        "exp_avg_sq_absmaxes[1] must be torch.float32, got torch.float64",
    ),
    (
        CODED,
        first("exp_avg_absmaxes", torch.ones(6)[::2], CODED),
        ValueError,
        "exp_avg_absmaxes[0] must be contiguous, got strides (2,)",
    ),
    (
        REMAINDER,
        second("remainders", torch.ones(7, dtype=torch.int32), REMAINDER),
        TypeError,
        "remainders[1] must be torch.int16, got torch.int32",
    ),
    (
        REMAINDER,
        second("remainders", torch.ones(8, dtype=torch.int16), REMAINDER),
        ValueError,
        "remainders[1] must have 7 elements, got 8",
    ),
]


def moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    if not isinstance(value, torch.Tensor) or device == "cpu":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("case", "change", "error", "message"), CASES, ids=[case[3][:40] for case in CASES]
)
def test_rejected(
    case: Any, change: dict[str, Any], error: type[Exception], message: str, device: str
) -> None:
    before = case.copy()
    arguments = {k: moved(v, device) for k, v in {**case.tensors, **case.options, **change}.items()}
    with pytest.raises(error, match=f"^{re.escape(f'adamw_step: {message}')}$"):
        adamw_step(**arguments)
    for name, tensors in case.tensors.items():
        for left, right in zip(tensors, getattr(before, name), strict=True):
            assert torch.equal(left, right), "nothing is written before everything is checked"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", [FP32, CODED, REMAINDER, STOCHASTIC])
def test_the_base_cases_are_accepted(case: Any, device: str) -> None:
    arguments = {**case.copy().tensors, **case.options}
    adamw_step(**{name: moved(value, device) for name, value in arguments.items()})


@pytest.mark.parametrize("name", [*CODED.tensors])
def test_tensors_on_two_devices(name: str) -> None:
    case = REMAINDER if name == "remainders" else CODED
    if name == "params":
        pattern = r"grads\[1\] must be on meta like the other tensors, got cpu"
    else:
        pattern = rf"{name}\[1\] must be on cpu like the other tensors, got meta"
    there = case.tensors[name][1].to("meta")
    arguments = {**case.copy().tensors, **case.options, **second(name, there, case)}
    with pytest.raises(ValueError, match=f"^adamw_step: {pattern}$"):
        adamw_step(**arguments)


def test_the_check_runs_in_front_of_the_registered_op() -> None:
    lists = (*FP32.tensors.values(), [1, 0], [0, 1], [0, 0])
    scalars = {name: FP32.options[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    with pytest.raises(ValueError, match=r"adamw_step: steps\[1\] must be in \[1, 2\^31\), got 0"):
        torch.ops.feinwerk.adamw_step(*lists, **scalars)


def test_a_rejection_under_compile_keeps_its_message() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **tensors: adamw_step(**tensors, lr=-1.0, steps=[1, 2]), backend="aot_eager"
    )
    with pytest.raises(Exception, match="adamw_step: lr must be a finite number of at least 0"):
        compiled(**FP32.copy().tensors)
