"""What a split layer stores: the dense base stream and the named ortho streams."""

from libortho.core.streams.base import BaseStream
from libortho.core.streams.ortho import Columns, Entries, Factors, OrthoStream

__all__ = ["BaseStream", "Columns", "Entries", "Factors", "OrthoStream"]
