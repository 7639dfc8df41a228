"""AdamW with 8-bit states under DeepSpeed ZeRO, and its universal checkpoints in and out.

DeepSpeed itself is imported by `to_universal` alone.
"""

from feinwerk.integrations.deepspeed.config import check_config, complete_config
from feinwerk.integrations.deepspeed.convert import to_universal
from feinwerk.integrations.deepspeed.optimizer import AdamW
from feinwerk.integrations.deepspeed.universal import export_universal, import_universal

__all__ = [
    "AdamW",
    "check_config",
    "complete_config",
    "export_universal",
    "import_universal",
    "to_universal",
]
