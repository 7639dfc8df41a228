"""Small PEFT models, stock and fused, and the rule by which their results are compared."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch
from torch import nn

from feinwerk import NF4Weight, dequantize_model, quantize_model
from feinwerk.integrations.peft import fuse
from feinwerk.philox import keep_mask
from feinwerk.testing import ulp

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
BASES = ("dense", "nf4", "bnb")
METHODS = ("lora", "dora")


class Mlp(nn.Module):
    """Two layers with a nonlinearity between them; `head` is there to be saved as a whole."""

    def __init__(self, width: int = 64, inner: int = 128, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def to_bitsandbytes(model: nn.Module, **options: Any) -> None:
    """Replace Linears by quantized Linear4bit layers, and mark the model as PEFT expects it."""
    import bitsandbytes as bnb

    blocksize = {"blocksize": options.pop("blocksize")} if "blocksize" in options else {}
    options = {"quant_type": "nf4", "compute_dtype": torch.float32, **options}
    compute = options.pop("compute_dtype")
    for name in ("up", "down"):
        dense = getattr(model, name)
        layer = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, dense.bias is not None, compute, **options
        )
        layer.weight = bnb.nn.Params4bit(
            dense.weight.data.clone(), requires_grad=False, module=layer, **options, **blocksize
        )
        layer.bias = dense.bias
        setattr(model, name, layer.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def make_base(base: str, **sizes: Any) -> Mlp:
    torch.manual_seed(0)
    model = Mlp(**sizes)
    if base == "nf4":
        quantize_model(model, skip=("head",))
    elif base == "bnb":
        to_bitsandbytes(model)
    return model


def config_of(method: str = "lora", **options: Any) -> peft.LoraConfig:
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], **options}
    return peft.LoraConfig(use_dora=method == "dora", **options)


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter weights as training would leave them: nothing zero, no gain of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "magnitude" in name:
                p.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                p.copy_(0.3 * noise)


def make(base: str, method: str = "lora", sizes: Any = None, **options: Any) -> peft.PeftModel:
    """A stock model, in training mode, its adapter random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lora_bias over a layer without bias, and the like
        model = peft.get_peft_model(make_base(base, **sizes or {}), config_of(method, **options))
    randomize(model)
    return model


def two_adapters(base: str, second: str = "lora", **options: Any) -> Any:
    """`default` is LoRA, `other` of another rank."""
    model = make(base)
    model.add_adapter("other", config_of(second, r=5, lora_alpha=2, **options))
    randomize(model, seed=4)
    return model


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def fused(model: peft.PeftModel) -> peft.PeftModel:
    """A fused copy."""
    twin = copy.deepcopy(model)
    assert fuse(twin)
    return twin


def in_double(model: peft.PeftModel) -> peft.PeftModel:
    """A stock copy in fp64, over the values that the base's 4-bit weights stand for."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        base = getattr(layer, "base_layer", None)
        if type(base).__name__ == "Linear4bit":
            layer.base_layer = from_bitsandbytes(base)
            layer.__class__ = peft.tuners.lora.Linear
    dequantize_model(twin, torch.float32)
    return twin.double()


def from_bitsandbytes(layer: Any) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    weight = NF4Weight.from_bitsandbytes(layer.state_dict())
    dense.weight = nn.Parameter(weight.dequantize(torch.float32), requires_grad=False)
    dense.bias = layer.bias
    return dense.train(layer.training)


def bitsandbytes_is_exact(model: nn.Module) -> bool:
    """Whether its CPU kernel reads its own bytes right: of some small shapes it does not."""
    import bitsandbytes as bnb

    return all(
        torch.equal(
            bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state),
            from_bitsandbytes(layer).weight,
        )
        for layer in model.modules()
        if type(layer) is bnb.nn.Linear4bit
    )


class Masked(nn.Module):
    """Dropout with a given mask, to put our mask into PEFT's formula."""

    def __init__(self, keep: torch.Tensor, p: float) -> None:
        super().__init__()
        self.keep, self.p = keep, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.keep, x, 0.0) / (1 - self.p)


def inject_masks(model: peft.PeftModel, x: torch.Tensor, seed: int, p: float) -> None:
    """The masks that the fused layers draw after manual_seed(seed), first `up`, then `down`."""
    torch.manual_seed(seed)
    rows = x.numel() // x.shape[-1]
    for layer in (model.base_model.model.up, model.base_model.model.down):
        drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
        keep = keep_mask(drawn, rows, layer.in_features, p)
        layer.lora_dropout["default"] = Masked(keep.view(*x.shape[:-1], -1), p)


def run(model: nn.Module, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The output, and the gradient of x and of every trained parameter, by name."""
    dtype = next(p.dtype for name, p in model.named_parameters() if "lora_" in name)
    x = x.detach().to(dtype if dtype is torch.float64 else x.dtype).requires_grad_()
    model.zero_grad()
    with torch.enable_grad():
        y = model(x, **kwargs)
        weights = torch.linspace(-1, 2, max(1, y.numel())).view(-1)[: y.numel()].view(y.shape)
        (y * weights.to(y.dtype)).sum().backward()
    results = {"y": y.detach(), "grad x": x.grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            results[f"grad {name}"] = p.grad
    return results


def spread(
    model: nn.Module, x: torch.Tensor, truth: Any, dtype: torch.dtype, **kwargs: Any
) -> dict[str, float]:
    """How far each fp64 result moves when all that goes in is off by one rounding to dtype.

    Every weight and x get a relative error of eps / 2 with a random sign, three times over: what
    rounding every factor of every sum does to the result, cancellation included. A magnitude gets
    what its norm may be off in fp32, see `norm_condition`: only their quotient counts.
    """
    generator = torch.Generator().manual_seed(7)
    moved = dict.fromkeys(truth, 0.0)

    def off(value: torch.Tensor, error: torch.Tensor | float) -> torch.Tensor:
        sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
        return value.double() * (1 + sign * error)

    half = torch.finfo(dtype).eps / 2

    for _ in range(3):
        twin = copy.deepcopy(model)
        for layer in twin.modules():
            for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
                condition = norm_condition(layer, name)
                magnitude.weight.data = off(magnitude.weight.data, condition * 2.0**-24)
        for p in twin.parameters():
            p.data = off(p.data, half)
        for name, value in run(twin, off(x, half), **kwargs).items():
            if name in truth and value is not None and value.numel():
                moved[name] = max(moved[name], float((value - truth[name]).abs().max()))
    # The gradient of a magnitude is divided by the norm, whatever the magnitude is.
    for path, layer in model.named_modules():
        for name in getattr(layer, "lora_magnitude_vector", {}):
            key = f"grad {path}.lora_magnitude_vector.{name}.weight"
            if truth.get(key) is not None:
                error = norm_condition(layer, name) * 2.0**-24 * truth[key].abs()
                moved[key] += float(error.max())
    return moved


def norm_condition(layer: Any, name: str) -> torch.Tensor:
    """By how much the norm's sum exceeds it: ||W||^2 + 2 s <U, B> + s^2 <B G, B> may cancel."""
    W, s = layer.base_layer.weight.data, abs(float(layer.scaling[name]))
    A, B = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    square = (W + float(layer.scaling[name]) * B @ A).square().sum(dim=1)
    W, A, B = W.abs(), A.abs(), B.abs()
    cross, gram = ((W @ A.t()) * B).sum(dim=1), ((B @ (A @ A.t())) * B).sum(dim=1)
    return (W.square().sum(dim=1) + 2 * s * cross + s * s * gram) / square


def assert_like_peft(
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    double: nn.Module,
    x: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> None:
    """|ours - fp64| <= 2 max|PEFT - fp64| + ulp + 4 spread, for the output and each gradient.

    The form of docs/numerics.md's budget; `double` is the stock model in fp64, and its `spread`
    stands for the sum over |x| |W| there, which a network of several layers does not have. `dtype`
    is that of the activations.
    """
    truth = run(double, x, **kwargs)
    moved = spread(double, x, truth, dtype, **kwargs)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, value in truth.items():
        if value is None:
            assert ours[name] is None, name
            continue
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == value.shape, name
        if value.numel() == 0:
            continue
        budget = 2 * float((theirs[name].double() - value).abs().max()) + 4 * moved[name]
        budget += float(ulp(value.abs().max(), ours[name].dtype))
        error = float((ours[name].double() - value).abs().max())
        assert error <= budget, f"{name}: {error:.3e} > {budget:.3e}"


def assert_output_near(y: torch.Tensor, double: nn.Module, x: torch.Tensor, **kwargs: Any) -> None:
    """|y - fp64| <= ulp + 4 spread, element by element, for an output alone."""
    with torch.no_grad():
        truth = double(x.double(), **kwargs)
    moved = spread(double, x, {"y": truth}, y.dtype, **kwargs)["y"]
    budget = float(ulp(truth.abs().max(), y.dtype)) + 4 * moved
    error = float((y.double() - truth).abs().max())
    assert error <= budget, f"{error:.3e} > {budget:.3e}"
