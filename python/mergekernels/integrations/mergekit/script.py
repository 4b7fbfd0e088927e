"""``mergekernels-mergekit``: mergekit-yaml with these kernels, and the same arguments."""

from __future__ import annotations

import sys

from ...errors import MergeError
from . import enable, stats

__all__ = ["main"]


def main() -> None:
    """Runs ``mergekit-yaml``; unless ``--quiet`` is among its arguments, says at the end what was served."""
    try:
        enable()
    except MergeError as error:
        print(f"mergekernels-mergekit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    try:
        mergekit_yaml.main(prog_name="mergekernels-mergekit")
    except SystemExit as done:
        if not done.code and "--quiet" not in sys.argv[1:]:
            print(f"mergekernels: mergekit: {stats()}", file=sys.stderr)
        raise
