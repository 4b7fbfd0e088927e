"""The command `lora merge`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, nearest
from .guard import guarded
from .output import Output

if TYPE_CHECKING:
    from .._methods.protocol import MethodInfo, Param
    from ..adapters.report import MergeReport

__all__ = ["merge_command", "numbers"]


def merge_command(
    method: str,
    adapters: Sequence[str],
    out: str,
    *,
    rank: int | None,
    energy: float | None,
    weights: str | None,
    base: str | None,
    params: Sequence[str],
    dialect: str,
    seed: int,
    spread: Any,
    dtype: str | None,
    form: Any,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """See `mergekernels lora merge --help`."""
    output = Output("lora merge", as_json=as_json, quiet=quiet)

    def work() -> int:
        from .._methods.matrix_table import get_matrix

        given = _parameters(get_matrix(method, "adapters").info, params)
        if weights is not None:
            given["weights"] = numbers(weights)
        from ..adapters.merge import merge_adapters
        from ..adapters.saving import check_target

        check_target(out, form, overwrite=overwrite)
        merged = merge_adapters(
            list(adapters),
            method,
            rank=rank,
            energy=energy,
            base=base,
            dialect=dialect,
            seed=seed,
            spread=spread,
            out_dtype=dtype,
            device=device,
            **given,
        )
        merged.save(out, form, overwrite=overwrite)
        if not as_json:
            for warning in merged.report.warnings:
                output.note(f"warning: {warning}")
        output.result({**merged.report.to_dict(), "out": out, "form": form}, _text(merged.report, out))
        return 0

    guarded(output, work)


def numbers(text: str) -> float | list[float]:
    """One number, or several between commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(
            "--weights is not usable", code="parameter.value", expected="numbers between commas", got=repr(text)
        ) from None
    return values[0] if len(values) == 1 else values


def _parameters(info: MethodInfo, texts: Sequence[str]) -> dict[str, Any]:
    """Keyword -> value of all NAME=VALUE; names as in recipes or in Python."""
    known = {p.name: p for p in info.params} | {p.keyword: p for p in info.params}
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        param = known.get(name)
        if not equals or param is None:
            raise ArgumentError(
                f"{info.name} has no parameter '{name}'" if equals else "a parameter has no value",
                code="parameter.unknown" if equals else "usage",
                expected="one of " + ", ".join(p.name for p in info.params) if equals else "NAME=VALUE",
                got=repr(text),
                hint=nearest(name, known) if equals else None,
            )
        if param.keyword in given:
            raise ArgumentError(f"parameter '{name}' is given twice", code="usage", got=repr(text))
        given[param.keyword] = _value(info, param, value)
    return given


def _value(info: MethodInfo, param: Param, text: str) -> Any:
    from .._methods.arguments import Unusable, convert

    parts = text.split(",") if param.per_model and "," in text else [text]
    try:
        values = [convert(param, _word(param, part), recipe=True) for part in parts]
    except Unusable as error:
        raise ArgumentError(
            f"{info.name}: '{param.name}' is not usable",
            code="parameter.value",
            expected=error.expected,
            got=repr(text),
            hint=error.hint,
        ) from None
    return values[0] if len(parts) == 1 else values


def _word(param: Param, text: str) -> str | bool:
    """True and false for a switch, else the text."""
    return text == "true" if param.kind == "bool" and text in ("true", "false") else text


def _text(report: MergeReport, out: str) -> str:
    from ..report.text import duration, plural, table

    groups: dict[tuple[Any, ...], list[float]] = {}
    for module in report.modules.values():
        key = (f"{module.shape[0]} x {module.shape[1]}", _ranks(module.ranks), module.rank, module.route)
        groups.setdefault(key, []).append(module.kept_energy)
    rows = [
        (str(len(kept)), shape, ranks, str(rank), f"{min(kept):.4f}", route)
        for (shape, ranks, rank, route), kept in groups.items()
    ]
    return "\n".join(
        (
            f"{out}: {plural(len(report.modules), 'module')} of {plural(len(report.inputs), 'adapter')} by "
            f"{report.method}, in {duration(report.seconds)}",
            table(rows, ("modules", "matrix", "ranks in", "rank out", "least energy kept", "route")),
        )
    )


def _ranks(ranks: Sequence[int]) -> str:
    """ "3 x 16", "8 + 16", "100: 8 to 64"."""
    if len(set(ranks)) == 1:
        return f"{len(ranks)} x {ranks[0]}"
    return " + ".join(map(str, ranks)) if len(ranks) <= 4 else f"{len(ranks)}: {min(ranks)} to {max(ranks)}"
