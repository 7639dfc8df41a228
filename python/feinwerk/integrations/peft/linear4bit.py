"""FusedLinear4bit: PEFT's layer over bitsandbytes' Linear4bit, which this module imports."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit

from feinwerk.integrations.peft.layer import FusedLayer


class FusedLinear4bit(FusedLayer, Linear4bit):
    """`peft.tuners.lora.Linear4bit` on the fused ops, reading bitsandbytes' bytes in place."""

    def _get_name(self) -> str:
        return "Linear4bit"
