"""lora_linear: a frozen linear layer with LoRA and DoRA adapters, one or many, and its gradient."""

from feinwerk.ops.lora_linear.op import adapted_linear

__all__ = ["adapted_linear"]
