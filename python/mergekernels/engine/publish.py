"""The last step: small files, index and manifest into the tree, then one rename."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OutputError
from .context import Context
from .fileops import fsync_dir, publish_swap, remove_tree, write_small
from .manifest import manifest_bytes
from .receipts import Receipt
from .staging import MANIFEST_NAME, Staging
from .target import check_apart, refuse_to_replace

__all__ = ["publish"]


def publish(ctx: Context, staging: Staging, receipts: Sequence[Receipt], *, overwrite: bool) -> tuple[str, int]:
    """Completes `tree/`, renames it to OUT and removes the staging. (checkpoint_sha256, bytes of small files written).

    Raises
    ------
    OutputError : a file of the tree is not what its receipt says, or OUT appeared meanwhile. InputError : a small file
        changed since the plan.
    """
    io, plan = ctx.io, ctx.plan
    for receipt in receipts:
        path = staging.tree / receipt.file
        size = io.stat(path).st_size
        if size != receipt.size:
            raise OutputError(
                "a staged file changed",
                code="output.staged",
                file=str(path),
                expected=f"{receipt.size} bytes",
                got=str(size),
            )
    written = 0
    for small in plan.small:
        data = small.read(io)
        write_small(io, staging.temporary(small.name), staging.tree / small.name, data)
        written += len(data)
    text, digest = manifest_bytes(plan, receipts)
    write_small(io, staging.temporary(MANIFEST_NAME), staging.tree / MANIFEST_NAME, text)
    _remove_strays(ctx, staging)
    fsync_dir(io, staging.tree)
    if overwrite:
        # Hours may have passed since the plan.
        touched = check_apart(staging.out, plan.merge, plan.small)
        if touched is not None:
            raise touched
        refuse_to_replace(staging.out)
    publish_swap(io, staging.tree, staging.out, staging.root / "replaced", replace=overwrite)
    staging.remove()
    fsync_dir(io, staging.out.parent)
    return digest, written + len(text)


def _remove_strays(ctx: Context, staging: Staging) -> None:
    """Nothing is published that the plan does not know."""
    plan = ctx.plan
    known = {MANIFEST_NAME, *(f.name for f in plan.files), *(s.name for s in plan.small)}
    for name in ctx.io.listdir(staging.tree):
        path = staging.tree / name
        if name in known:
            continue
        if path.is_dir() and not path.is_symlink():
            remove_tree(ctx.io, path)
        else:
            ctx.io.unlink(path)
