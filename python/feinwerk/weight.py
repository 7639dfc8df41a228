"""NF4Weight: one tensor held in NF4, packed codes and absmax (plain or double-quantized) together.

```
   flattened weight  |<- blocksize ->|<- blocksize ->|  ...            n elements
   packed            two codes a byte, even element in the high nibble  ceil(n/2) bytes
   absmax            one per block: fp32, or with double quantization a uint8 code:
                     absmax[b] = nested_codebook[code[b]] * nested_absmax[b / 256] + nested_offset
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from feinwerk import _checks, checkpoint
from feinwerk.codebook import dynamic_map
from feinwerk.ops.blockwise_quantize import blockwise_quantize
from feinwerk.ops.nf4_dequantize import nf4_dequantize
from feinwerk.ops.nf4_embedding import nf4_embedding
from feinwerk.ops.nf4_linear import nf4_linear
from feinwerk.ops.nf4_quantize import nf4_quantize
from feinwerk.slabs import quantize_in_slabs


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """One tensor held in NF4: about 4.13 bits an element with double quantization, 4.5 without.

    The bytes are bitsandbytes' own layout, used in place by every op. Immutable: `to` returns a
    new object. `dtype` is the dtype that `dequantize` and `embedding` return by default; changing
    it never touches a code.

    Args:
        packed: uint8, ceil(n/2) elements of any shape, contiguous; the even element of the
            flattened weight in the high nibble.
        absmax: fp32 [ceil(n/blocksize)], or uint8 codes when the nested tensors are given.
        shape: the weight's shape, (N, K) for `linear` and `embedding`.
        blocksize: elements per absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        dtype: output dtype: torch.float32, torch.bfloat16 or torch.float16.
        nested_absmax: fp32 [ceil(nblocks/256)]; all three nested tensors or none.
        nested_codebook: fp32 [256].
        nested_offset: fp32, 0-dim.

    Raises:
        TypeError: if a tensor or `dtype` has the wrong dtype.
        ValueError: if a size, the blocksize, the shape or a device does not fit the others.

    Source:
        QLoRA (arXiv 2305.14314), sections 3 and appendix E; bitsandbytes' layout, docs/format.md.

    Example:
        >>> w = NF4Weight.from_dense(torch.randn(8, 64))
        >>> w.linear(torch.randn(3, 64)).shape
        torch.Size([3, 8])
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_codebook: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check the parts against each other."""
        op = "NF4Weight"
        shape = tuple(self.shape)
        object.__setattr__(self, "shape", shape)
        if not shape or not all(isinstance(n, int) and n >= 1 for n in shape):
            _checks.reject(ValueError, op, "shape", "be sizes of at least 1", shape)
        _checks.out_dtype(op, self.dtype)
        for name, value in self._tensors().items():
            _checks.tensor(op, name, value)
        _checks.nf4_weight(
            op, self.packed, self.absmax, self.nested_absmax, self.nested_codebook,
            self.nested_offset, self.numel, self.blocksize, self.packed.device,
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        rule: str = "cpu",
        allow_non_finite: bool = False,
        nested_offset: float | torch.Tensor | None = None,
    ) -> NF4Weight:
        """Quantize a dense tensor.

        Beside the result it needs a workspace of fixed size only: where a call would need more (the
        reference backend, a weight that is not contiguous), slabs of the weight are quantized in
        turn, bit-equal to one call.

        Args:
            weight: fp32, bf16 or fp16, any shape.
            blocksize: elements per absmax, 32 to 4096.
            double_quant: also quantize absmax to 8 bits in blocks of 256.
            rule: "cpu" is byte-equal to bitsandbytes on CPU, "cuda" follows its CUDA thresholds.
            allow_non_finite: pass NaN and infinity on as bitsandbytes does.
            nested_offset: what is subtracted from absmax before it is quantized; by default its
                mean. bitsandbytes' own (thread-dependent) mean gives bitsandbytes' bytes.

        Returns:
            The quantized weight, its dtype that of `weight`.

        Raises:
            TypeError: if `weight` is not a tensor of those dtypes.
            ValueError: if it is empty or not finite, or blocksize, rule or nested_offset break
                their rule.

        Source:
            QLoRA (arXiv 2305.14314), section 3.

        Example:
            >>> NF4Weight.from_dense(torch.zeros(2, 64), double_quant=False).packed[0].item()
            119
        """
        op = "NF4Weight.from_dense"
        _checks.tensor(op, "weight", weight)
        _checks.floating(op, "weight", weight)
        _checks.blocksize(op, blocksize)
        if weight.numel() == 0 or weight.dim() == 0:
            rule_text = "have at least 1 dimension and 1 element"
            _checks.reject(ValueError, op, "weight", rule_text, tuple(weight.shape))
        if nested_offset is not None and not double_quant:
            _checks.reject(
                ValueError, op, "nested_offset", "be None without double_quant", nested_offset
            )

        def quantize(slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return nf4_quantize(
                slab, blocksize=blocksize, rule=rule, allow_non_finite=allow_non_finite
            )

        with torch.no_grad():
            packed, absmax = quantize_in_slabs(weight.detach(), blocksize, quantize)
            shape, dtype = tuple(weight.shape), weight.dtype
            if not double_quant:
                return cls(packed, absmax, shape, blocksize, dtype)
            codebook = dynamic_map(device=weight.device)
            if nested_offset is None:
                codes, nested_absmax, offset = blockwise_quantize(
                    absmax, codebook, center=True, rule=rule
                )
            else:
                offset = torch.as_tensor(nested_offset, dtype=torch.float32, device=weight.device)
                if offset.numel() != 1 or not bool(offset.isfinite()):
                    _checks.reject(ValueError, op, "nested_offset", "be one finite number", offset)
                offset = offset.detach().reshape(()).clone()
                codes, nested_absmax, _ = blockwise_quantize(absmax - offset, codebook, rule=rule)
        return cls(packed, codes, shape, blocksize, dtype, nested_absmax, codebook, offset)

    @property
    def double_quant(self) -> bool:
        """Whether absmax is itself quantized."""
        return self.nested_absmax is not None

    @property
    def numel(self) -> int:
        """Number of weight elements."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where all the tensors live."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors together."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense weight, codebook[code] * absmax rounded once to `dtype`.

        Args:
            dtype: torch.float32, torch.bfloat16 or torch.float16; default `self.dtype`.

        Returns:
            A tensor of `self.shape`.

        Raises:
            TypeError: for any other dtype.

        Source:
            docs/ops/nf4_dequantize.md.

        Example:
            >>> NF4Weight.from_dense(torch.ones(2, 64)).dequantize().mean().item()
            1.0
        """
        return nf4_dequantize(
            self.packed, self.absmax, self.nested_absmax, self.nested_codebook,
            self.nested_offset, shape=list(self.shape), blocksize=self.blocksize,
            dtype=dtype or self.dtype,
        )  # fmt: skip

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, compute: str = "exact"
    ) -> torch.Tensor:
        """Return y = x @ W^T + bias without ever holding W densely.

        Args:
            x: fp32, bf16 or fp16, [..., K], 1-D to 4-D.
            bias: [N], optional.
            compute: "exact", or "int8" for activations rounded to 8 bits (forward only).

        Returns:
            y [..., N] in x's dtype.

        Raises:
            ValueError: if the weight is not 2-D or the sizes do not fit.

        Source:
            docs/ops/nf4_linear.md.

        Example:
            >>> NF4Weight.from_dense(torch.ones(2, 64)).linear(torch.ones(64))
            tensor([64., 64.])
        """
        rows, columns = self._matrix("linear")
        return nf4_linear(
            x, self.packed, self.absmax, bias, self.nested_absmax, self.nested_codebook,
            self.nested_offset, N=rows, K=columns, blocksize=self.blocksize, compute=compute,
        )  # fmt: skip

    def embedding(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows W[indices], dequantized.

        Args:
            indices: int64 or int32, any shape, each in [0, N).

        Returns:
            [..., K] in `self.dtype`.

        Raises:
            ValueError: if the weight is not 2-D.
            IndexError: if an index is out of range.

        Source:
            docs/ops/nf4_embedding.md.

        Example:
            >>> NF4Weight.from_dense(torch.ones(5, 64)).embedding(torch.tensor([4, 0])).shape
            torch.Size([2, 64])
        """
        rows, columns = self._matrix("embedding")
        return nf4_embedding(
            indices, self.packed, self.absmax, self.nested_absmax, self.nested_codebook,
            self.nested_offset, N=rows, K=columns, blocksize=self.blocksize, dtype=self.dtype,
        )  # fmt: skip

    def to(
        self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None
    ) -> NF4Weight:
        """Return the same weight on another device or with another output dtype.

        Args:
            device: where every tensor goes; default: where it is.
            dtype: the new output dtype; no tensor changes.

        Returns:
            A new NF4Weight; tensors that need not move are shared.

        Raises:
            TypeError: if `dtype` is not torch.float32, torch.bfloat16 or torch.float16.

        Source:
            docs/format.md.

        Example:
            >>> NF4Weight.from_dense(torch.ones(2, 64)).to(dtype=torch.bfloat16).dtype
            torch.bfloat16
        """
        moved = {
            name: tensor if device is None else tensor.to(device)
            for name, tensor in self._tensors().items()
        }
        return NF4Weight(
            **moved, shape=self.shape, blocksize=self.blocksize, dtype=dtype or self.dtype
        )

    def to_bitsandbytes(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the state-dict entries that bitsandbytes writes for this weight, byte for byte.

        A flat dict of tensors: safetensors and torch.save take it as it is.

        Args:
            prefix: put before every key, e.g. "model.layers.0.mlp.up_proj.".

        Returns:
            `<prefix>weight`, `<prefix>weight.absmax`, ... in bitsandbytes' order.

        Raises:
            ValueError: if the weight is not representable there (a nested_offset that is not
                finite).

        Source:
            bitsandbytes 0.50.2, Linear4bit's state dict; docs/format.md.

        Example:
            >>> list(NF4Weight.from_dense(torch.ones(2, 64)).to_bitsandbytes())[0]
            'weight'
        """
        offset = self.nested_offset
        if offset is not None and not offset.is_meta and not bool(offset.isfinite()):
            op = "NF4Weight.to_bitsandbytes"
            _checks.reject(ValueError, op, "nested_offset", "be finite", offset.item())
        return checkpoint.encode(
            checkpoint.Fields(
                **self._tensors(), shape=self.shape, blocksize=self.blocksize, dtype=self.dtype
            ),
            prefix,
        )

    @classmethod
    def from_bitsandbytes(cls, state_dict: Mapping[str, Any], prefix: str = "") -> NF4Weight:
        """Read a weight that bitsandbytes (or `to_bitsandbytes`) wrote.

        Args:
            state_dict: a state dict with the keys of one or many layers.
            prefix: what stands before `weight` in the keys of this one.

        Returns:
            The weight; its tensors share memory with `state_dict`.

        Raises:
            ValueError: if a key is missing, unknown, truncated or does not fit the others, if
                quant_type is not nf4 or quant_map not the NF4 codebook; the message names the key.

        Source:
            bitsandbytes 0.50.2, QuantState.as_dict; docs/format.md.

        Example:
            >>> w = NF4Weight.from_dense(torch.ones(2, 64))
            >>> NF4Weight.from_bitsandbytes(w.to_bitsandbytes("up.")  , "up.").shape
            (2, 64)
        """
        return cls(**vars(checkpoint.decode(state_dict, prefix)))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field name; the nested ones only where they are used."""
        tensors = {"packed": self.packed, "absmax": self.absmax}
        for name in ("nested_absmax", "nested_codebook", "nested_offset"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        return tensors

    def _matrix(self, op: str) -> Sequence[int]:
        if len(self.shape) != 2:
            _checks.reject(ValueError, f"NF4Weight.{op}", "shape", "be (N, K)", self.shape)
        return self.shape

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild through the constructor, so that a tampered pickle is checked as well."""
        fields = (
            self.packed, self.absmax, self.shape, self.blocksize, self.dtype,
            self.nested_absmax, self.nested_codebook, self.nested_offset,
        )  # fmt: skip
        return NF4Weight, fields

    def __repr__(self) -> str:
        """Name shape, format, size and place; no values."""
        kind = "double-quantized" if self.double_quant else "fp32"
        return (
            f"NF4Weight(shape={self.shape}, dtype={self.dtype}, blocksize={self.blocksize}, "
            f"absmax={kind}, nbytes={self.nbytes}, device='{self.device}')"
        )


torch.serialization.add_safe_globals([NF4Weight])
