"""What runs under torchrun in the Trainer tests: a tiny model, saved half way or resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from feinwerk.integrations.transformers import ShardedCheckpoint
from feinwerk.optim import AdamW, ShardedAdamW
from tests.integrations.state_digest import digest
from tests.integrations.torchrun import report_kinds

SAVED, LAST, BATCH = 3, 6, 12
OPTIONS = {"lr": 5e-3, "betas": (0.9, 0.99)}


class Lines(Dataset[dict[str, torch.Tensor]]):
    """72 lines of 8 tokens, each one more than the one before."""

    def __init__(self) -> None:
        self.lines = 3 + (2 * torch.arange(72).unsqueeze(1) + torch.arange(8)) % 147

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.lines[index], "labels": self.lines[index]}


def make_model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=150, hidden_size=32, intermediate_size=132, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


class Watch(transformers.TrainerCallback):
    """Notes losses, and the optimizer's states when they are saved or have been loaded."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.digests: dict[str, str] = {}
        self.local = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.digests[f"saved {state.global_step}"] = digest(optimizer.optimizer)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step:
            self.digests["loaded"] = digest(optimizer.optimizer)

    def on_train_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        for state_of in optimizer.optimizer.state.values():
            for value in state_of.values():
                own = value.to_local() if hasattr(value, "to_local") else value
                self.local += own.numel() * own.element_size()


def train(folder: Path, kind: str, resume: bool, checkpoints: Path | None = None) -> dict[str, Any]:
    """One run of the Trainer; what it came to."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model, watch = make_model(), Watch()
    optimizer_class: type[AdamW] = AdamW
    options: dict[str, Any] = dict(OPTIONS)
    callbacks: list[Any] = [watch]
    if kind == "sharded":
        optimizer_class = ShardedAdamW
        options |= {"reduce_gradients": False, "timeout": 60}
        named = checkpoints / f"checkpoint-{SAVED}" if checkpoints else None
        callbacks.insert(0, ShardedCheckpoint(resume_from=named))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / kind), use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=BATCH // world_size, max_steps=LAST, logging_steps=1,
        save_steps=SAVED, lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=1.0,
        weight_decay=0.1, ddp_backend="gloo" if world_size > 1 else None, seed=1,
        dataloader_num_workers=0, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Lines(), callbacks=callbacks,
        optimizer_cls_and_kwargs=(optimizer_class, options),
    )  # fmt: skip
    checkpoint = str((checkpoints or folder / kind) / f"checkpoint-{SAVED}") if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = {name: p.detach().double().sum().item() for name, p in model.named_parameters()}
    return {
        "losses": watch.losses,
        "digests": watch.digests,
        "weights": weights,
        "state_bytes": watch.local,
        "global_step": trainer.state.global_step,
    }


if __name__ == "__main__":
    report_kinds(train)
