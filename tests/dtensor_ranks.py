"""One of the processes that merge modules of DTensors: `python dtensor_ranks.py RANK WORLD FILE`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mergekernels as mk
from mergekernels import _dtensors

SHAPES = {"rows": (37, 130), "columns": (24, 66), "one": (1, 7), "cube": (5, 4, 6), "copies": (9, 3), "plain": (11,)}
PLACES = {"rows": Shard(0), "columns": Shard(1), "one": Shard(0), "cube": Shard(2), "copies": Replicate()}
METHODS = [
    ("linear", {"weights": [0.2, 0.5, 0.3]}, False),
    ("ties", {"density": 0.3, "weights": 0.5}, True),
    ("dare_ties", {"density": 0.5, "seed": 7, "weights": 0.5, "rescale": False}, True),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1, "weights": 0.5}, True),
    ("slerp", {"t": 0.3}, True),  # sums over the tensor
    ("della", {"density": 0.5, "epsilon": 0.2, "weights": [1, 0.5, -0.2]}, True),  # ranks rows
    ("magmax", {}, True),
]


class Net(nn.Module):
    """One parameter of each kind; tied twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.again = self.rows
        self.register_buffer("count", torch.tensor(3))


def spread(seed: int, mesh: object) -> Net:
    """The same module, its parameters spread over the mesh."""
    net = Net(seed)
    for name, place in PLACES.items():
        whole = net._parameters[name]
        assert whole is not None
        net._parameters[name] = nn.Parameter(distribute_tensor(whole.detach(), mesh, [place]))  # type: ignore[arg-type]
    net._parameters["again"] = net._parameters["rows"]
    return net


def refused(code: str, *args: object, **kwargs: object) -> None:
    """The call is refused by name, on every process."""
    try:
        mk.merge_modules(*args, **kwargs)  # type: ignore[arg-type]
    except mk.MergeError as error:
        assert error.code == code and error.tensor, error
        return
    raise AssertionError(code)


def main(rank: int, world: int, file: str) -> None:
    """Every method beside the call on whole tensors, new and in place; then what is refused."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    gathered: list[str] = []
    whole_call = _dtensors._gathered

    def counted(call: Any, name: str, *rest: Any) -> torch.Tensor:
        gathered.append(call.method.info.name)
        return whole_call(call, name, *rest)

    _dtensors._gathered = counted
    for method, params, needs in METHODS:
        count = 1 if method == "slerp" else 3
        nets, base = [Net(i) for i in range(count)], Net(9) if needs else None
        want = mk.merge_modules(nets, method, base=base, **params)
        given = [spread(i, mesh) for i in range(count)]
        origin = spread(9, mesh) if needs else None
        new = mk.merge_modules(given, method, base=origin, **params)
        mk.merge_modules(given, method, base=origin, out=given[0], **params)
        for got in (new, given[0]):
            assert got.again is got.rows and int(got.count) == 3  # type: ignore[union-attr]
            for name in SHAPES:
                value = got._parameters[name]
                assert isinstance(value, DTensor) is (name in PLACES), name
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                assert torch.equal(whole, want._parameters[name]), (method, name)  # type: ignore[arg-type]
    assert set(gathered) == {"slerp", "della"}, gathered  # the others need no more than their shards
    nets = [spread(i, mesh) for i in range(2)]
    refused("dtensor.method", nets, "tsv_m", base=spread(9, mesh))
    refused("dtensor.method", nets, "ties", base=spread(9, mesh), weights=1, density=0.5, scope="model")
    refused("dtensor.placements", [nets[0], Net(1)], "linear", weights=1)
    if rank == world - 1:  # what one process alone sees, all refuse
        nets[1].rows.to_local().data[-1, -1] = float("nan")  # type: ignore[operator, union-attr]
    refused("data.nonfinite", nets, "ties", base=spread(9, mesh), weights=1, density=0.5)
    refused("data.nonfinite", nets, "linear", weights=1)
    layers = [nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)) for _ in range(2)]
    for layer in layers:
        for parameter in layer.parameters():
            dist.broadcast(parameter.data, 0)
    want = mk.merge_modules(layers, "linear", weights=[0.2, 0.9], normalize=False)
    sharded = [fully_shard(layer, mesh=mesh) for layer in layers]  # type: ignore[arg-type]
    mk.merge_modules(sharded, "linear", weights=[0.2, 0.9], normalize=False, out=sharded[1])
    for got, value in zip(sharded[1].parameters(), want.parameters(), strict=True):
        assert torch.equal(got.full_tensor(), value)  # type: ignore[attr-defined]
    sharded[1](torch.randn(3, 6))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
