"""The commands that list: `methods`, `backends`."""

from __future__ import annotations

from .guard import guarded
from .output import Output

__all__ = ["backends_command", "methods_command"]


def methods_command(name: str | None, *, as_json: bool) -> None:
    """See `mergekernels methods --help`."""
    output = Output("methods", as_json=as_json)

    def work() -> int:
        from .._methods.catalogue import described, methods
        from ..report.methods import info_dict, method_text, methods_text

        if name is not None:
            infos = described(name)
            data = [info_dict(i) for i in infos]
            output.result(data[0] if len(data) == 1 else data, "\n\n\n".join(method_text(i) for i in infos))
        else:
            models, adapters = methods(), methods("adapters")
            infos = [*models.values(), *(i for i in adapters.values() if i not in models.values())]
            output.result([info_dict(i) for i in infos], methods_text(infos))
        return 0

    guarded(output, work)


def backends_command(*, as_json: bool) -> None:
    """See `mergekernels backends --help`."""
    output = Output("backends", as_json=as_json)

    def work() -> int:
        from dataclasses import asdict

        from .._backends.status import backends
        from ..report.backends import backends_text

        table = backends()
        output.result([asdict(b) for b in table], backends_text(table))
        return 0

    guarded(output, work)
