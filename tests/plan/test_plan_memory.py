"""A plan against a model, an optimizer and the allocator: bytes exact, the peak within 10 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from feinwerk import plan, testing
from feinwerk.optim import AdamW
from tests.plan.memory_meter import (
    adapted,
    causal_model,
    model_bytes,
    peak_bytes,
    state_bytes,
    tokens_of,
    training_steps,
)

pytest.importorskip("transformers")
pytest.importorskip("peft")

R = 8
SIZES = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 512, "num_hidden_layers": 3}
WITHIN = 0.1


def norm_bytes(model: Any) -> int:
    """Bytes of the base norms that fused DoRA layers keep."""
    caches = (getattr(module, "_norms", None) for module in model.modules())
    return sum(cache._base.nbytes for cache in caches if cache and cache._base is not None)


@pytest.mark.parametrize(
    ("method", "dtype", "options"),
    [
        ("full", "float32", {}),
        ("full", "bfloat16", {"state_bits": 32}),
        ("full", "bfloat16", {"bf16_params": "stochastic", "state_bits": 16}),
        ("rslora", "bfloat16", {"state_bits": 16}),
        ("qlora", "bfloat16", {"min_quantized_numel": 1}),
        ("qdora", "float32", {"blocksize": 64}),
        ("dora", "bfloat16", {"min_quantized_numel": 1, "blocksize": 32}),
    ],
)
def test_weights_adapters_gradients_and_states_are_exact(
    method: str, dtype: str, options: dict[str, Any]
) -> None:
    model = causal_model("Llama", method, dtype, "sdpa", R, **SIZES)
    tokens = tokens_of(model, 1, 16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, **options)
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer.step()
    found = plan(model, method=method, r=R, dtype=dtype, batch=1, seq=16, **options)
    assert found.weights + found.adapters == model_bytes(model) + norm_bytes(model)
    assert found.states == state_bytes(optimizer)
    assert found.gradients == gradients
    assert found.trained == sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize(("blocksize", "double_quant"), [(64, False), (128, True), (4096, True)])
def test_nf4_weights_are_exact(blocksize: int, double_quant: bool) -> None:
    import feinwerk

    model = causal_model("Llama", "full", "bfloat16", "sdpa", R, **SIZES)
    feinwerk.quantize_model(
        model, skip=("lm_head",), blocksize=blocksize, double_quant=double_quant
    )
    found = plan(model, method="qlora", r=R, nf4_blocksize=blocksize, double_quant=double_quant)
    assert found.weights == model_bytes(model)


def measured_peak(model: Any, batch: int, seq: int) -> int:
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    steps = training_steps(model, optimizer, tokens_of(model, batch, seq))
    return model_bytes(model) + peak_bytes(steps)


@pytest.mark.parametrize("shape", [(2, 64), (1, 8)], ids=["activations", "weights"])
@pytest.mark.parametrize(
    ("method", "dtype", "attention"),
    [
        ("full", "float32", "sdpa"),
        ("full", "bfloat16", "eager"),
        ("lora", "bfloat16", "sdpa"),
        ("qlora", "float32", "eager"),
        ("qdora", "bfloat16", "sdpa"),
        pytest.param("qdora", "float32", "sdpa", marks=pytest.mark.full),
        pytest.param("qlora", "bfloat16", "eager", marks=pytest.mark.full),
        pytest.param("dora", "float32", "eager", marks=pytest.mark.full),
    ],
)
def test_the_peak_of_a_step(
    method: str, dtype: str, attention: str, shape: tuple[int, int]
) -> None:
    batch, seq = shape
    model = causal_model("Llama", method, dtype, attention, R, **SIZES)
    settings = {"method": method, "r": R, "dtype": dtype, "attention": attention}
    found = plan(model, batch=batch, seq=seq, **settings)
    assert found.peak == pytest.approx(measured_peak(model, batch, seq), rel=WITHIN)


@pytest.mark.parametrize("kind", ["Phi3", "Qwen2", "Qwen3"])
def test_the_peak_of_a_step_of_other_models(kind: str) -> None:
    model = causal_model(kind, "qdora", "bfloat16", "sdpa", R, **SIZES)
    found = plan(model, method="qdora", r=R, batch=2, seq=48)
    assert found.peak == pytest.approx(measured_peak(model, 2, 48), rel=WITHIN)


def test_the_peak_with_an_untied_head_and_a_large_vocabulary() -> None:
    sizes = {**SIZES, "vocab_size": 4000}
    model = causal_model("Llama", "full", "bfloat16", "sdpa", R, **sizes, tie_word_embeddings=False)
    found = plan(model, method="full", batch=1, seq=16)
    assert found.peak == pytest.approx(measured_peak(model, 1, 16), rel=WITHIN)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_peak_with_checkpointing(method: str) -> None:
    model = causal_model(
        "Llama", method, "bfloat16", "sdpa", R, **{**SIZES, "num_hidden_layers": 8}
    )
    base = model if method == "full" else model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = {"method": method, "r": R, "batch": 4, "seq": 64}
    found = plan(model, checkpointing=True, **settings)
    assert found.peak < 0.7 * plan(model, **settings).peak
    assert found.peak == pytest.approx(measured_peak(model, 4, 64), rel=WITHIN)


def test_gradients_of_earlier_batches_are_there_when_accumulating() -> None:
    model = causal_model("Llama", "full", "float32", "sdpa", R, **SIZES)
    optimizer = AdamW(model.parameters())
    tokens = tokens_of(model, 2, 64)

    def two_batches() -> None:
        for _ in range(2):  # the states come with the first step
            for _ in range(2):
                model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    measured = model_bytes(model) + peak_bytes(two_batches)
    settings = {"method": "full", "dtype": "float32", "batch": 2, "seq": 64}
    found = plan(model, accumulate=True, **settings)
    assert found.peak - plan(model, **settings).peak > 0.5 * found.gradients
    assert found.peak == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({}, (2, 64)), ({"hidden_size": 512, "intermediate_size": 1536}, (1, 8))],
    ids=["activations", "decoded weights"],
)
@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_the_peak_on_the_reference_backend(
    method: str, sizes: dict[str, int], shape: tuple[int, int]
) -> None:
    batch, seq = shape
    model = causal_model("Llama", "full", "bfloat16", "sdpa", R, **{**SIZES, **sizes})
    adapted(model, method, R)
    with testing.use_backend("reference"):
        measured = measured_peak(model, batch, seq)
    found = plan(model, method=method, r=R, batch=batch, seq=seq, device="cuda")
    assert found.peak == pytest.approx(measured, rel=WITHIN)


def test_dtype_of_adapters_counts() -> None:
    model = causal_model("Llama", "full", "bfloat16", "sdpa", R, **SIZES)
    wide = plan(model, method="lora", r=R)
    narrow = plan(model, method="lora", r=R, adapter_dtype="bfloat16")
    assert wide.adapters == 2 * narrow.adapters
    assert narrow.states - wide.states == 2 * wide.trained  # the remainder
    assert torch.bfloat16.itemsize == 2
