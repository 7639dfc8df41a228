"""Training with fused PEFT layers: loss curves beside PEFT's, checkpointing, compile, Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from feinwerk import dequantize_model, explain, quantize_model
from feinwerk.integrations.peft import fuse, fused_config
from feinwerk.testing import assert_same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
cases = pytest.importorskip("peft_cases")

STEPS = 50
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
# T5 asks `wo` for the dtype of its input, so it stays dense under any 4-bit format.
DENSE = ("lm_head", "classifier", "wo")
METHODS = ("lora", "qlora", "dora", "qdora")


def make_base(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            initializer_range=0.2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            initializer_range=0.2,
            num_attention_heads=4, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)
    config = transformers.T5Config(
        vocab_size=53, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1,
        num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    """Three batches with something to learn in them: counting tokens, or naming the first one."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(3):
        start = torch.randint(0, 53, (4, 1), generator=generator)
        tokens = (start + torch.arange(10)) % 53
        labels = {"llama": tokens, "bert": start[:, 0] % 3, "t5": tokens[:, :6].contiguous()}[name]
        found.append({"input_ids": tokens, "labels": labels})
    return found


def make(name: str, method: str, **options: Any) -> Any:
    base = make_base(name)
    if method.startswith("q"):
        quantize_model(base, skip=DENSE)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[name], task_type=TASKS[name],
        use_dora=method.endswith("dora"), **options,
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(base, config).train()


def train(model: Any, name: str, optimizer: str, steps: int = STEPS) -> list[float]:
    """Losses; the learning rates let the loss fall by half and more, and stay below chaos."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rule: Any = {
        "sgd": lambda: torch.optim.SGD(trained, lr=0.1),
        "adamw": lambda: torch.optim.AdamW(trained, lr=1e-2),
    }[optimizer]()
    data, losses = batches(name), []
    for step in range(steps):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        rule.step()
        rule.zero_grad()
        losses.append(loss.item())
    return losses


def curves(name: str, method: str, optimizer: str) -> tuple[list[float], ...]:
    """The losses of our fused model, of stock PEFT in fp32, and of stock PEFT in fp64."""
    stock = make(name, method)
    double, ours = copy.deepcopy(stock), copy.deepcopy(stock)
    dequantize_model(double, torch.float32)
    double.double()
    fuse(ours)
    tuned = [row for row in explain(ours).rows if row.layer == "lora.Linear"]
    assert tuned
    assert {row.op for row in tuned} == {"dora_linear" if "dora" in method else "lora_linear"}
    a, b, c = (train(model, name, optimizer) for model in (ours, stock, double))
    assert c[-1] < 0.8 * c[0]
    return a, b, c


def matrix(*small: str) -> list[Any]:
    """Every model with every method; only these in the small run."""
    return [
        pytest.param(name, method, marks=() if f"{name} {method}" in small else pytest.mark.full)
        for name in TARGETS
        for method in METHODS
    ]


@pytest.mark.parametrize(
    ("name", "method"), matrix("llama lora", "llama qdora", "bert qlora", "t5 dora")
)
def test_loss_curve_with_sgd(name: str, method: str) -> None:
    for ours, fp32, fp64 in zip(*curves(name, method, "sgd"), strict=True):
        assert abs(ours - fp64) <= 2 * abs(fp32 - fp64) + 1e-5 * fp64


@pytest.mark.parametrize(("name", "method"), matrix("llama qlora", "bert dora"))
def test_loss_curve_with_adamw(name: str, method: str) -> None:
    ours, fp32, fp64 = curves(name, method, "adamw")
    assert abs(ours[0] - fp64[0]) <= 2 * abs(fp32[0] - fp64[0]) + 1e-5 * fp64[0]
    assert abs(ours[-1] - fp64[-1]) <= 0.01 * fp64[-1]


def gradients(model: Any, seed: int = 3, **kwargs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**kwargs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_gradient_checkpointing_changes_no_bit(method: str, reentrant: bool) -> None:
    model = make("llama", method, lora_dropout=0.2)
    cases.randomize(model)
    fuse(model)
    batch = batches("llama")[0]
    plain = gradients(model, **batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model, **batch)
    assert len(plain) == 1 + (3 if "dora" in method else 2) * len(TARGETS["llama"])
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert_same_bits(checkpointed[name], grad, name)
    assert not torch.equal(gradients(model, seed=4, **batch)["loss"], plain["loss"])


@pytest.mark.parametrize(
    ("p", "eager_first"),
    [(0.2, False), *(pytest.param(*v, marks=pytest.mark.full) for v in [(0, False), (0, True)])],
)
@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compiled_in_one_graph(base: str, method: str, p: float, eager_first: bool) -> None:
    torch._dynamo.reset()
    model = cases.fused(cases.make(base, method, lora_dropout=p))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def results(run: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(6)
        return cases.run(run, cases.X)

    if eager_first:
        model(cases.X)
    got = results(compiled)
    for name, value in results(model).items():
        key = name.replace("grad base_model", "grad _orig_mod.base_model")
        assert_same_bits(got[key], value, name)
    model.eval()
    with torch.no_grad():
        a, b = compiled(cases.X), model(cases.X)
        # In eval mode the eager norm is kept apart, and computed for the weight's own dtype.
        cases.assert_output_near(a, cases.in_double(model), cases.X)
        cases.assert_output_near(b, cases.in_double(model), cases.X)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_trains_alike(method: str) -> None:
    torch._dynamo.reset()
    model = make("llama", method)
    fuse(model)
    compiled = torch.compile(copy.deepcopy(model))
    a, b = train(compiled, "llama", "adamw", 10), train(model, "llama", "adamw", 10)
    double = make("llama", method)
    dequantize_model(double, torch.float32)
    c = train(double.double(), "llama", "adamw", 10)
    assert abs(a[0] - c[0]) <= 2 * abs(b[0] - c[0]) + 1e-5 * c[0]
    assert abs(a[-1] - c[-1]) <= 0.01 * c[-1]


def test_trainer(tmp_path: Path) -> None:
    """Transformers' Trainer: accumulation, checkpointing, bf16 autocast, a saved adapter."""
    base = make_base("llama")
    quantize_model(base)
    config = fused_config(
        peft.LoraConfig(
            r=4,
            lora_dropout=0.1,
            target_modules=TARGETS["llama"],
            task_type="CAUSAL_LM",
            use_dora=True,
        )
    )
    model = peft.get_peft_model(base, config)
    rows = [
        {key: value[i] for key, value in batch.items()}
        for batch in batches("llama")
        for i in range(4)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, gradient_checkpointing=True, learning_rate=2e-2,
        gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=True, use_cpu=True,
        logging_steps=1, report_to=[], save_steps=8,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # no autocast from here on
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {row.path for row in explain(model).rows if row.layer == "lora.Linear"} == {"fused"}
    again = make_base("llama")
    quantize_model(again)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "checkpoint-8")
    fuse(loaded)
    with torch.no_grad():
        tokens = batches("llama")[0]["input_ids"]
        assert_same_bits(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_files_give_the_same_logits(tmp_path: Path, name: str, method: str) -> None:
    stock = make(name, method)
    cases.randomize(stock)
    ours = copy.deepcopy(stock)
    fuse(ours)
    batch = batches(name)[0]
    logits = {}
    with torch.no_grad():
        for kind, model in (("stock", stock), ("ours", ours)):
            model.save_pretrained(tmp_path / kind)
            for other in ("stock", "ours"):
                base = make_base(name)
                if method.startswith("q"):
                    quantize_model(base, skip=DENSE)
                loaded = peft.PeftModel.from_pretrained(base, tmp_path / kind).eval()
                if other == "ours":
                    fuse(loaded)
                logits[kind, other] = loaded(**batch).logits
    for other, model in (("stock", stock), ("ours", ours)):
        for kind in ("stock", "ours"):
            assert_same_bits(logits[kind, other], model.eval()(**batch).logits)
