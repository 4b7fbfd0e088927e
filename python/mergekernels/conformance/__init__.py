"""The conformance kit: what the original implementations give on a small fixed family of inputs, and a judge.

`python -m mergekernels.conformance` runs the methods of this package over the kit; with `--outputs FOLDER` it judges
outputs of another tool that are laid out in the same way.
"""

from .judge import Verdict, judge
from .kit import Case, Kit, open_kit
from .run import outputs_of

__all__ = ["Case", "Kit", "Verdict", "judge", "open_kit", "outputs_of"]
