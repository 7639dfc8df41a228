"""Copies between a GPU and its host, for states that are kept on the host: all at once, pinned.

Pageable memory is copied through a small pinned buffer of the driver's, at a fraction of the link's
speed, and a blocking copy for each tensor leaves the link idle in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies in memory of the host; the host waits once, for all of them.

    Args:
        tensors: on any devices; those on the CPU are returned as they are.
    """
    copies = [_host_copy(tensor) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def to_device(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy back into the first of each pair what `to_host` gave, without waiting.

    Pinned memory is not given to another use before its copy has ended.

    Args:
        pairs: tensors of a device, each with its copy on the host.
    """
    for there, here in pairs:
        there.copy_(here, non_blocking=here.is_pinned())
