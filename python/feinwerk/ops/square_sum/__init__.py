"""square_sum: the exact sum of the rows' sums of squares of a list of tensors, as integers."""

from feinwerk.ops.square_sum.op import square_sum

__all__ = ["square_sum"]
