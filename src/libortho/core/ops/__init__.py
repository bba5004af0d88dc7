"""The two arithmetic kinds of a split layer: the base product and what an ortho stream adds to it."""

from libortho.core.ops.base import base_linear
from libortho.core.ops.ortho import add_columns, add_factors, add_sparse

__all__ = ["add_columns", "add_factors", "add_sparse", "base_linear"]
