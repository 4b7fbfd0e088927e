"""python -m mergekernels.conformance: this package, or another tool's outputs, against the kit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .._backends.dispatch import pick, requested
from ..errors import InputError, MergeError, nearest
from .judge import Verdict, judge
from .kit import Case, Kit, open_kit, read_output
from .run import outputs_of

_EPILOG = """Exit status: 0 if every case agrees, 1 if one does not, 2 if nothing could be judged.
Outputs of another tool: one file outputs/CASE.safetensors per case, with the tensors under the names that the kit's own
files have; kit.json says what each case merges, inputs/family.safetensors holds the inputs."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mergekernels.conformance",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", help="cpu, reference, triton or cuda; default: the best for host tensors")
    parser.add_argument("--method", help="only the cases of this method")
    parser.add_argument("--tool", help="only the cases of this tool")
    parser.add_argument("--kit", type=Path, help="folder of another kit")
    parser.add_argument("--outputs", type=Path, help="judge the files in FOLDER/outputs instead of our own results")
    options = parser.parse_args(arguments)
    if options.outputs is not None and options.backend is not None:
        parser.error("--outputs judges files, and --backend makes results: one of the two")
    try:
        kit = open_kit(options.kit)
        cases = _chosen(kit, options.method, options.tool)
        if options.outputs is None:
            pick("stream", (), requested(options.backend))  # one that cannot run judges nothing
        elif not any(_file(options.outputs, case).is_file() for case in cases):
            raise InputError(
                "there is no output of these cases",
                code="conformance.outputs",
                file=str(options.outputs),
                expected=f"outputs/{cases[0].id}.safetensors and so on in this folder",
            )
        verdicts = [_verdict(kit, case, options.outputs, options.backend) for case in cases]
    except MergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for verdict in verdicts:
        mark = "ok  " if verdict.agrees else "FAIL"
        same = (
            "same bits" if verdict.differing == 0 else f"{verdict.differing:.2%} differ, by at most {verdict.error:.2g}"
        )
        case = verdict.case
        print(
            f"{mark} {case.id} ({case.tool} {case.version}, {case.method}, {case.dialect}): {verdict.problem or same}"
        )
    good = sum(v.agrees for v in verdicts)
    print(f"{good} of {len(verdicts)} cases agree")
    return 0 if good == len(verdicts) else 1


def _chosen(kit: Kit, method: str | None, tool: str | None) -> list[Case]:
    for name, value, known in (
        ("method", method, {c.method for c in kit.cases}),
        ("tool", tool, {c.tool for c in kit.cases}),
    ):
        if value is not None and value not in known:
            raise MergeError(
                f"the kit has no cases of this {name}",
                code=f"conformance.{name}",
                expected="one of " + ", ".join(sorted(known)),
                got=repr(value),
                hint=nearest(value, known),
            )
    chosen = [c for c in kit.cases if method in (None, c.method) and tool in (None, c.tool)]
    if not chosen:
        raise MergeError("the kit has no such case", code="conformance.none", got=f"method {method}, tool {tool}")
    return chosen


def _file(outputs: Path, case: Case) -> Path:
    return outputs / "outputs" / f"{case.id}.safetensors"


def _verdict(kit: Kit, case: Case, outputs: Path | None, backend: str | None) -> Verdict:
    expected, _ = kit.expected(case)
    try:
        if outputs is not None:
            got, _ = read_output(_file(outputs, case))
        else:
            got = outputs_of(kit, case, backend)
    except MergeError as error:
        return Verdict(case, False, float("inf"), 1.0, str(error))
    return judge(case, got, expected)


if __name__ == "__main__":
    sys.exit(main())
