"""LoRA and DoRA layers of PEFT on Feinwerk's fused ops: same model, same parameters, same files."""

from feinwerk.integrations.peft.fuse import fuse, fused_config, invalidate, unfuse
from feinwerk.integrations.peft.layer import FusedLayer, FusedLinear

__all__ = ["FusedLayer", "FusedLinear", "fuse", "fused_config", "invalidate", "unfuse"]
