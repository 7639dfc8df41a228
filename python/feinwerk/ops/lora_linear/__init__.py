"""lora_linear: a frozen linear layer with any number of LoRA and DoRA adapters, and its gradient."""

from feinwerk.ops.lora_linear.op import adapted_linear

__all__ = ["adapted_linear"]
