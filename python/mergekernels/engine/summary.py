"""The dry run: a plan as plain data, for printing."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from .identity import canonical_json

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["summarise"]

READ_RATE = 2.0e9
WRITE_RATE = 0.8e9
"""Assumed bytes per second of input read and merged, and of output written and synced."""

_EXAMPLES = 3


def summarise(plan: Plan) -> dict[str, Any]:
    """See `Plan.to_dict`."""
    merge = plan.merge
    members = len([t for t in merge.tensors if t.action == "merge"])
    result: dict[str, Any] = {
        "plan_hash": plan.hash,
        "method": merge.method,
        "then": [{name: dict(params)} for name, params in merge.then],
        "dialect": merge.dialect,
        "seed": merge.seed,
        "nan": merge.nan,
        "backend": plan.backend,
        "device": plan.device,
        "threads": plan.budget.threads,
        "memory": plan.budget.limit,
        "tile_bytes": plan.budget.tile * plan.budget.itemsize,
        "inputs": [
            {
                "label": c.label or c.path.name,
                "path": str(c.path),
                "files": len(c.files),
                "tensors": len(c.tensors),
                "bytes": sum(t.nbytes for t in c.tensors.values()),
            }
            for c in merge.inputs
        ],
        "output": {
            "files": [{"name": f.name, "bytes": f.size, "tensors": len(f.tensors)} for f in plan.files]
            if merge.output is None
            else [{"name": "adapter_model.safetensors", "bytes": plan.bytes_written, "tensors": 2 * members}],
            "kind": "checkpoint" if merge.output is None else "adapter",
            "small_files": [s.name for s in plan.small],
            "tensors": len(merge.tensors),
            "bytes": plan.bytes_written,
            "merged": members,
            "buffers": sum(t.action == "buffer" for t in merge.tensors),
            "copies": sum(t.action == "copy" for t in merge.tensors),
            "aliases": dict(merge.aliases),
        },
        "scope": "model" if plan.specs.measures_matrices else plan.specs.scope,
        "computed": None
        if plan.specs.whole is None
        else {"tier": plan.specs.whole.info.tier, "by": f"torch-{plan.device.partition(':')[0]}"},
        "passes": {"reads": plan.reads, "sampled": plan.survey.sampled, "writes": 1},
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": _peak(plan),
        "disk": None,
        "time": {
            "seconds": plan.bytes_read / READ_RATE + plan.bytes_written / WRITE_RATE,
            "read_rate": READ_RATE,
            "write_rate": WRITE_RATE,
            "assumed": True,
        },
        "parameters": _parameters(plan),
        "state": plan.state,
        "warnings": list(plan.warnings),
    }
    if plan.out is not None:
        free = shutil.disk_usage(plan.out.parent).free
        result["disk"] = {"path": str(plan.out.parent), "needed": plan.bytes_written, "free": free}
    return result


def _peak(plan: Plan) -> int:
    """Most bytes of tiles and statistics at a time."""
    budget, found = plan.budget, plan.survey
    tiles = budget.threads * budget.worker_bytes
    statistics = found.held + max(found.scope, sum(found.wants[: budget.window]))
    return tiles + min(budget.pool, statistics)


def _parameters(plan: Plan) -> list[dict[str, Any]]:
    """Tensors with equal parameters together, the largest group first."""
    groups: dict[bytes, list[str]] = {}
    for t in plan.merge.tensors:
        if t.action == "merge":
            groups.setdefault(canonical_json(dict(t.params)), []).append(t.name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [{"params": json.loads(key), "tensors": len(names), "examples": names[:_EXAMPLES]} for key, names in ordered]
