r"""NF4Module: what NF4Linear and NF4Embedding share, an NF4 weight as plain tensors of a module.

```
   weight            uint8 Parameter [ceil(n/2), 1], never trained        state dict: weight
   absmax            buffer, uint8 codes or fp32                                      weight.absmax
   nested_absmax     buffer, fp32  \                                         weight.nested_absmax
   nested_codebook   buffer, fp32   } double quantization                 weight.nested_quant_map
   nested_offset     buffer, fp32  /                        in weight.quant_state.bitsandbytes__nf4
   dtype             a torch.dtype: all that a cast of the module changes            there as well
```
`weight` is a parameter, so that sharding, device placement and adapters find it where they look;
the buffers are not persistent, because the state dict has bitsandbytes' keys instead. For FSDP2 the
same bytes are seen as matrices: nf4_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from feinwerk import _checks, checkpoint
from feinwerk.codebook import NESTED_BLOCKSIZE, dynamic_map
from feinwerk.nn import nf4_rows
from feinwerk.weight import NF4Weight

_BUFFERS = ("absmax", "nested_absmax", "nested_codebook", "nested_offset")
_ModuleT = TypeVar("_ModuleT", bound="NF4Module")


class NF4Module(nn.Module):
    """A module with one weight held in NF4; the base class of NF4Linear and NF4Embedding."""

    nested_absmax: torch.Tensor | None
    nested_codebook: torch.Tensor | None
    nested_offset: torch.Tensor | None
    blocksize: int
    dtype: torch.dtype
    weight_shape: tuple[int, int]
    # What `feinwerk.distributed.shard_nf4` has decided: over how many ranks, or why not.
    row_shards: int = 0
    replicated_because: str = ""

    def _hold(self, weight: NF4Weight) -> None:
        """Take over the tensors of `weight`; a packed Parameter stays the same object (ties)."""
        rows, columns = weight.shape
        self.weight_shape = (rows, columns)
        self.blocksize = weight.blocksize
        self.dtype = weight.dtype
        packed = weight.packed
        if not isinstance(packed, nn.Parameter):
            packed = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)
        by_rows = self.by_rows
        self._parameters.pop("absmax_rows", None)
        self._parameters["weight"] = packed
        for name in _BUFFERS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        if by_rows:
            nf4_rows.view(self)

    @property
    def by_rows(self) -> bool:
        """Whether `weight` and absmax are held as matrices that can be cut between rows."""
        return "absmax_rows" in self._parameters

    @property
    def weight(self) -> torch.Tensor:
        """The packed codes, uint8 [ceil(n/2), 1].

        A cast written around the module (`p.data = p.data.to(torch.bfloat16)`) leaves them as
        floats. 0..255 are exact in fp32, bf16 and fp16, so the codes are put back here, on first
        use, and the cast's dtype becomes the output dtype.
        """
        return self._bytes("weight")

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        # Reached only for what nn.Module does not register itself, such as a plain tensor that
        # torch.func or DataParallel puts in the parameter's place.
        self._parameters["weight"] = value  # type: ignore[assignment]

    def _bytes(self, name: str) -> torch.Tensor:
        parameter = self._parameters.get(name)
        if parameter is None:
            raise AttributeError(name)
        if parameter.dtype in _checks.FLOAT_DTYPES:
            self.dtype = parameter.dtype
            if torch.compiler.is_compiling():  # a traced `.data =` may not change the dtype
                return parameter.to(torch.uint8)
            parameter.data = parameter.data.to(torch.uint8)
        return parameter

    @property
    def absmax(self) -> torch.Tensor:
        """One per block of the flattened weight: fp32, or uint8 codes with double quantization.

        Raises:
            RuntimeError: if only the rows of this rank are here.
        """
        if self.by_rows:
            return nf4_rows.absmax(self, self._bytes("absmax_rows"))
        absmax = self._buffers.get("absmax")
        if absmax is None:
            raise AttributeError("absmax")
        return absmax

    @property
    def double_quant(self) -> bool:
        """Whether absmax is itself quantized."""
        return self.nested_absmax is not None

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight as one NF4Weight that shares memory with this module."""
        packed = self.weight
        return NF4Weight(
            packed, self.absmax, self.weight_shape, self.blocksize, self.dtype,
            self.nested_absmax, self.nested_codebook, self.nested_offset,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense weight, rounded once to `dtype`.

        Args:
            dtype: torch.float32, torch.bfloat16 or torch.float16; default `self.dtype`.

        Returns:
            [N, K].

        Raises:
            TypeError: for any other dtype.

        Source:
            docs/ops/nf4_dequantize.md.

        Example:
            >>> from feinwerk.nn import NF4Linear
            >>> NF4Linear(64, 8).dequantize().shape
            torch.Size([8, 64])
        """
        return self.nf4_weight.dequantize(dtype)

    @property
    def W_q(self) -> torch.Tensor:
        """The packed codes once more, under the name that makes PEFT call `dequantize()`.

        PEFT knows three kinds of quantized weight; of these only this attribute needs no tensor
        subclass. Without it DoRA would take its norms from the packed bytes.
        """
        return self.weight

    def _apply(self: _ModuleT, fn: Callable[[torch.Tensor], Any], recurse: bool = True) -> _ModuleT:
        """Move as every module does, but let a change of dtype touch nothing but `self.dtype`."""
        packed = {name: self._bytes(name).data for name in self._packed_names()}
        before = {name: self._buffers.get(name) for name in _BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        device = packed["weight"].device
        dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        for name, codes in packed.items():
            moved = self._parameters[name]
            assert moved is not None
            if moved.dtype is not torch.uint8:
                moved.data = codes.to(moved.device)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype is not old.dtype:
                self._buffers[name] = old.to(new.device)
        if dtype in _checks.FLOAT_DTYPES:
            self.dtype = dtype
        return self

    def _packed_names(self) -> tuple[str, ...]:
        return ("weight", "absmax_rows") if self.by_rows else ("weight",)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name in self._packed_names():
            self._bytes(name)  # puts codes back that were cast, before they are saved
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = nf4_rows.names(self)
        if nf4_rows.is_managed(self):
            # Shards; and torch's state-dict functions for FSDP look keys up as attributes. Tables
            # come as aliases: to those who ask "is it a buffer of the model" they are none, as
            # in a model that is not sharded.
            for name in own:
                if name not in self._parameters:
                    destination[prefix + name] = getattr(self, name).detach()
            return
        for name in own if self.by_rows else own[1:]:
            destination.pop(prefix + name, None)
        for key, tensor in self.nf4_weight.to_bitsandbytes(prefix).items():
            destination.setdefault(key, tensor if keep_vars else tensor.detach())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: state_dict[key] for key in checkpoint.own_keys(state_dict, prefix)}
        own |= nf4_rows.attribute_entries(state_dict, prefix)
        rest = {key: value for key, value in state_dict.items() if key not in own}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        held = {prefix + name for name in nf4_rows.names(self)}
        missing_keys += [key for key in missing if key not in held]
        if not own:
            if strict:
                missing_keys += checkpoint.key_names(prefix, self.double_quant)
            return
        try:
            self._load_weight(own, prefix, local_metadata.get("assign_to_params_buffers", False))
        except ValueError as error:
            error_msgs.append(str(error))

    def _load_weight(self, own: dict[str, Any], prefix: str, assign: bool) -> None:
        """Check all keys of the weight, then take them over; on an error nothing has changed."""
        op, key = type(self).__name__, f"{prefix}weight"
        packed = own.get(key)
        if (
            isinstance(packed, torch.Tensor)
            and len(own) == 1
            and tuple(packed.shape) == self.weight_shape
        ):
            rule = "hold NF4 codes with their quant_state (quantize a dense weight first)"
            _checks.reject(ValueError, op, key, rule, f"a dense {packed.dtype} weight")
        if nf4_rows.take_shards(self, own, prefix, assign):
            return
        if assign and nf4_rows.is_sharded(self.weight):
            rule = "be loaded with assign=False, or as shards, under fully_shard"
            _checks.reject(ValueError, op, key, rule, "a whole weight")
        if nf4_rows.attribute_entries(own, prefix):
            loaded = nf4_rows.read(self, own, prefix)
        else:
            loaded = NF4Weight.from_bitsandbytes(own, prefix)
        if loaded.shape != self.weight_shape:
            _checks.reject(ValueError, op, key, f"have shape {self.weight_shape}", loaded.shape)
        target = self.weight
        if assign:
            self._hold(loaded)
            return
        if target.is_meta:
            _checks.reject(
                ValueError, op, key,
                "be loaded into real memory: call to_empty() first, or pass assign=True",
                "a weight on the meta device",
            )  # fmt: skip
        with torch.no_grad():
            if self.by_rows:
                nf4_rows.fill(self, loaded, key)
            else:
                target.copy_(loaded.packed)
            for name in nf4_rows.NESTED if self.by_rows else _BUFFERS:
                new, old = getattr(loaded, name), self._buffers[name]
                if new is None:
                    self._buffers[name] = None
                elif old is None or old.shape != new.shape or old.dtype != new.dtype:
                    self._buffers[name] = new.to(target.device, copy=True)
                else:
                    old.copy_(new)
        self.blocksize, self.dtype = loaded.blocksize, loaded.dtype

    def reset_parameters(self) -> None:
        """Refuse: NF4 codes come from a dense layer or a checkpoint, never from a random draw."""
        raise NotImplementedError(
            f"{type(self).__name__}: reset_parameters must not be called, got an NF4 weight; "
            "quantize an initialized dense layer or load a checkpoint"
        )


def empty_weight(
    op: str,
    rows: int,
    columns: int,
    blocksize: int,
    double_quant: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> NF4Weight:
    """Return an all-zero NF4 weight in the sizes that a checkpoint will fill."""
    _checks.positive(op, "rows", rows)
    _checks.positive(op, "columns", columns)
    _checks.blocksize(op, blocksize)
    blocks = -(-rows * columns // blocksize)
    zero_code_twice = 0x77
    packed = torch.full(
        ((rows * columns + 1) // 2, 1), zero_code_twice, dtype=torch.uint8, device=device
    )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    shape = (rows, columns)
    absmax = torch.zeros(blocks, dtype=torch.float32, device=device)
    if not double_quant:
        return NF4Weight(packed, absmax, shape, blocksize, dtype)
    nested_absmax = absmax.new_zeros(-(-blocks // NESTED_BLOCKSIZE))
    return NF4Weight(
        packed, absmax.to(torch.uint8), shape, blocksize, dtype, nested_absmax,
        dynamic_map().to(device or packed.device), absmax.new_zeros(()),
    )  # fmt: skip
