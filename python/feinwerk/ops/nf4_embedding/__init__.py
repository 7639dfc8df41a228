"""nf4_embedding: rows of a weight held in NF4."""

from feinwerk.ops.nf4_embedding.op import nf4_embedding

__all__ = ["nf4_embedding"]
