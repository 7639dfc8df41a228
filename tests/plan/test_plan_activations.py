"""What a plan says is saved for the backward, against what autograd saves: the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from feinwerk.plan import Settings, saved
from feinwerk.plan.architecture import architecture
from feinwerk.plan.moments import activations
from tests.plan.memory_meter import adapted, causal_model, saved_bytes, tokens_of

pytest.importorskip("transformers")
pytest.importorskip("peft")

R, SEQ = 4, 24
# Every method of Llama, and of its like those that differ most.
CASES = [("Llama", method) for method in ("full", "lora", "dora", "qlora", "qdora")]
CASES += [(kind, method) for kind in ("Phi3", "Qwen3") for method in ("full", "qdora")]
MORE = [(kind, "qlora") for kind in ("Phi3", "Qwen3")]
MORE += [(kind, method) for kind in ("Mistral", "Qwen2") for method in ("full", "qlora", "qdora")]


def sizes_of(kind: str) -> dict[str, int]:
    return {"num_key_value_heads": 4} if kind == "Phi3" else {}


def check(model: Any, settings: Settings) -> None:
    tokens = tokens_of(model, settings.batch, settings.seq)
    owned = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # the first forward finds DoRA's norms; they are kept
        module.train()
    model(input_ids=tokens, labels=tokens)
    norms = [cache._base for m in model.modules() if (cache := getattr(m, "_norms", None))]
    owned += [norm for norm in norms if norm is not None]
    measured = saved_bytes(lambda: model(input_ids=tokens, labels=tokens).loss, owned)
    arch = architecture(model)
    predicted = activations(arch, settings).kept + saved.head(arch, settings).total
    assert measured == predicted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "method"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)]
)
def test_saved_bytes_are_exact(kind: str, method: str, attention: str) -> None:
    for dtype in ("float32", "bfloat16"):
        model = causal_model(kind, method, dtype, attention, R, **sizes_of(kind))
        for batch in (1, 2):
            settings = Settings(
                method=method, r=R, dtype=dtype, attention=attention, batch=batch, seq=SEQ
            )
            check(model, settings)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("up_proj",), ("down_proj", "o_proj")])
@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_saved_bytes_of_some_targets(method: str, targets: tuple[str, ...]) -> None:
    base = causal_model("Llama", "full", "bfloat16", "sdpa", R, num_hidden_layers=3)
    model = adapted(base, method, R, target_modules=list(targets))
    check(model, Settings(method=method, r=R, targets=targets, batch=2, seq=SEQ))


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_saved_bytes_under_dropout(method: str) -> None:
    base = causal_model("Llama", "full", "bfloat16", "sdpa", R)
    model = adapted(base, method, R, lora_dropout=0.1)
    check(model, Settings(method=method, r=R, dropout=0.1, batch=2, seq=SEQ))


def test_without_kv_groups_and_with_one_layer() -> None:
    for attention in ("sdpa", "eager"):
        model = causal_model(
            "Llama", "qdora", "float32", attention, R, num_key_value_heads=4, num_hidden_layers=1
        )
        settings = Settings(
            method="qdora", r=R, dtype="float32", attention=attention, batch=2, seq=SEQ
        )
        check(model, settings)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    model = causal_model("Llama", "qlora", "bfloat16", "sdpa", R, num_hidden_layers=5)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    tokens = tokens_of(model, 2, SEQ)
    owned = [*model.parameters(), *model.buffers()]
    measured = saved_bytes(lambda: model(input_ids=tokens, labels=tokens).loss, owned)
    settings = Settings(method="qlora", r=R, batch=2, seq=SEQ, checkpointing=True)
    arch = architecture(model)
    kept = activations(arch, settings)
    assert kept.kept == 5 * 2 * SEQ * 64 * torch.bfloat16.itemsize
    predicted = kept.kept + saved.head(arch, settings).total
    # Beside them torch keeps, for every layer, the state of the random generator and such.
    assert predicted <= measured <= 1.1 * predicted + 5 * 6000
