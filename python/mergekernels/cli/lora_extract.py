"""The command `lora extract`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .guard import guarded
from .output import Output
from .reported import reported

if TYPE_CHECKING:
    from ..adapters.extract import ExtractReport

__all__ = ["extract_command"]


def extract_command(
    base: str,
    tuned: str,
    out: str,
    *,
    rank: int | None,
    energy: float | None,
    include: Sequence[str],
    exclude: Sequence[str],
    save_rest: bool,
    spread: Any,
    dtype: str,
    device: str,
    threads: int | None,
    memory: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """See `mergekernels lora extract --help`."""
    output = Output("lora extract", as_json=as_json, quiet=quiet)

    def work() -> int:
        from ..adapters.extract import extract_adapter
        from ..engine.events import Progress

        def call(progress: Any) -> Any:
            def tell(done: int, total: int, name: str) -> None:
                progress(Progress("merge", done, total, 0, name))

            return extract_adapter(
                base,
                tuned,
                out,
                rank=rank,
                energy=energy,
                include=include,
                exclude=exclude,
                save_rest=save_rest,
                spread=spread,
                out_dtype=dtype,
                device=device,
                threads=threads,
                memory=memory,
                overwrite=overwrite,
                progress=tell,
            )

        return reported(output, call, _text)

    guarded(output, work)


def _text(report: ExtractReport) -> str:
    from ..report.text import duration, plural, table

    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for module in report.modules.values():
        key = (f"{module.shape[0]} x {module.shape[1]}", module.rank)
        groups.setdefault(key, []).append((module.kept_energy, module.error))
    rows = [
        (str(len(found)), shape, str(rank), f"{min(k for k, _ in found):.4f}", f"{max(e for _, e in found):.4f}")
        for (shape, rank), found in groups.items()
    ]
    rest = [
        f"{plural(len(names), 'module')} {what}"
        for names, what in ((report.unchanged, "unchanged"), (report.saved, "saved whole"))
        if names
    ]
    return "\n".join(
        (
            f"{report.out}: {', '.join([plural(len(report.modules), 'module'), *rest])}, in {duration(report.seconds)}",
            table(rows, ("modules", "matrix", "rank", "least energy kept", "largest error")),
        )
    )
