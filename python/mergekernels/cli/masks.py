"""The commands `masks compress` and `masks restore`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .guard import guarded
from .output import Output
from .reported import reported

if TYPE_CHECKING:
    from ..engine.masks import CompressReport

__all__ = ["compress_command", "restore_command"]

METHODS = ("tall_mask", "emr")


def compress_command(
    arguments: Sequence[str],
    *,
    base: str | None,
    method: str | None,
    backend: str | None,
    device: str,
    threads: int | None,
    memory: str | None,
    lenient: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """See `mergekernels masks compress --help`."""
    output = Output("masks compress", as_json=as_json, quiet=quiet)

    def work() -> int:
        from ..engine.masks import compress
        from ..engine.recipe import load_recipe, resolve

        recipe, out = _recipe(arguments, base, method)

        def call(progress: Any) -> Any:
            return compress(
                resolve(load_recipe(recipe, lenient=lenient, collect=True)),
                out,
                backend=backend,
                device=device,
                threads=threads,
                memory=memory,
                progress=progress,
            )

        return reported(output, call, _text)

    guarded(output, work)


def restore_command(
    masks: str,
    expert: str,
    dest: str,
    *,
    base: str | None,
    backend: str | None,
    device: str,
    threads: int | None,
    memory: str | None,
    shard_size: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """See `mergekernels masks restore --help`."""
    output = Output("masks restore", as_json=as_json, quiet=quiet)

    def work() -> int:
        from ..engine.masks import restore
        from ..engine.memory import parse_size
        from ..report.run import run_text

        def call(progress: Any) -> Any:
            return restore(
                masks,
                expert,
                dest,
                base=base,
                backend=backend,
                device=device,
                threads=threads,
                memory=memory,
                shard_size=parse_size(shard_size),
                overwrite=overwrite,
                progress=progress,
            )

        return reported(output, call, run_text)

    guarded(output, work, interrupted="Finished files are kept beside DEST; the same command resumes.")


def _recipe(arguments: Sequence[str], base: str | None, method: str | None) -> tuple[str | Mapping[str, Any], str]:
    """(recipe, OUT) from the positional arguments: a recipe file, or experts."""
    *inputs, out = arguments
    if not inputs:
        raise ArgumentError(
            "one argument is not enough", code="usage", expected="a recipe, or experts; then OUT", got=repr(out)
        )
    recipes = [name for name in inputs if Path(name).suffix in (".yml", ".yaml", ".json")]
    if recipes:
        options = [name for name, value in (("--base", base), ("--method", method)) if value is not None]
        beside = [name for name in inputs if name != recipes[0]] + options
        if beside:
            raise ArgumentError(
                "a recipe names its own experts, base and method",
                code="usage",
                expected=f"{recipes[0]} alone, then OUT",
                got=f"{recipes[0]} beside " + ", ".join(beside),
            )
        return inputs[0], out
    method = METHODS[0] if method is None else method
    if method not in METHODS:
        raise ArgumentError(f"{method} has no masks", code="usage", expected=" or ".join(METHODS), got=method)
    if base is None:
        raise ArgumentError(
            "experts need their base",
            code="usage",
            expected="--base BASE, or a recipe (.yml, .yaml) in the place of the experts",
            got=", ".join(inputs),
        )
    return {"merge_method": method, "base_model": base, "models": [{"model": m} for m in inputs]}, out


def _text(report: CompressReport) -> str:
    from ..report.text import duration, size, table

    count = len(report.experts)
    rows = [
        (str(i), name, f"{scale:g}") for i, (name, scale) in enumerate(zip(report.experts, report.scales, strict=True))
    ]
    return "\n".join(
        (
            f"{report.out}: a vector and {count} mask{'' if count == 1 else 's'}",
            table(rows, ("", "expert", "scale")),
            f"{size(report.bytes_in)} in, {size(report.bytes_out)} out, in {duration(report.seconds)}; tensor memory "
            f"{size(report.peak_tensor_memory)} of {size(report.memory)}",
        )
    )
