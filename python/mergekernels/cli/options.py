"""Options that several commands have, and what their help ends with."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "EXIT_CODES",
    "Backend",
    "Device",
    "Json",
    "Lenient",
    "Memory",
    "Quiet",
    "Recipe",
    "Seed",
    "ShardSize",
    "Threads",
]

EXIT_CODES = """\b
Exit status:
  0    done, or: the checkpoints agree
  1    the checkpoints differ (diff), or an unexpected error
  2    wrong usage, or a recipe that is not valid
  3    inputs that are missing, malformed or do not fit together; a plan with problems
  4    the backend asked for cannot run
  5    values forbid the merge: NaN, Inf, unequal integer tensors
  6    writing or publishing failed, or verify found damage
  130  stopped by Ctrl-C, 143 by a termination request; the same `run` resumes

\b
Environment: MERGEKERNELS_BACKEND, MERGEKERNELS_CPU_ISA (base, avx2, avx512), MERGEKERNELS_NUM_THREADS; options win.
"""

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (mergekit's YAML).")]
Json = Annotated[bool, typer.Option("--json", help="JSON objects on stdout, one a line, instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Threads. Default: MERGEKERNELS_NUM_THREADS, else the cores this process may use.",
        show_default=False,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="auto, reference, cpu, triton or cuda. A named backend runs or fails, nothing falls back. "
        "Default: MERGEKERNELS_BACKEND, else auto.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where to compute: cpu, cuda or cuda:N.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help='Bound on tensor memory: bytes, or "800MiB", "2GiB". Default: a quarter of what is available, at least '
        "512 MiB.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="Seed of everything random. Default: the recipe's, else 0.", show_default=False),
]
ShardSize = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Most bytes of tensor data in one output file; a larger tensor gets its own."),
]
Lenient = Annotated[bool, typer.Option("--lenient", help="Unknown recipe keys are warnings instead of errors.")]
