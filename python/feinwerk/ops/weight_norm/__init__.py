"""weight_norm: the row norms of W + scaling B A, factored, and of W alone."""

from feinwerk.ops.weight_norm.op import row_norms, weight_norm

__all__ = ["row_norms", "weight_norm"]
