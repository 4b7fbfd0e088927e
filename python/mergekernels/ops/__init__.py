"""Public tensor functions. Each checks its arguments, picks a backend and calls it; none knows a file or a method."""

from .combine import combine, concrete, seg_dot
from .keep import Keep
from .program import Program
from .select import select
from .stream import stream
from .surgery import pcgrad

__all__ = ["Keep", "Program", "combine", "concrete", "pcgrad", "seg_dot", "select", "stream"]
