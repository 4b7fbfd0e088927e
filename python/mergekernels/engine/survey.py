"""What the tensors of a merge will need, found before anything is read: by asking the method how it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .._methods.modifiers import Modified
from .._methods.protocol import Coeffs, Method, Round
from .needs import Needs, first_measured, is_sum, of_coeffs, of_scope, of_tensor
from .resolved import ResolvedTensor, sources_of
from .specs import Specs
from .wholeneeds import whole_bytes

__all__ = ["Survey", "survey", "widest"]


@dataclass(frozen=True)
class Survey:
    """reads : expected full reads of the most demanding tensor. sampled : whether a sample comes first.

    features : what the backend must be able to do, as far as it shows. needed, roomy : bytes of one source in a tile,
    see `cut_budget`. floor : bytes of statistics without which some tensor cannot be merged.
    wants : bytes of statistics that each tensor makes use of, descending. scope : bytes that a wave over the whole
    model makes use of. whole : where tensors are needed whole, the name of the one that needs most. held : bytes of
    coefficients of single tensors, from their measuring until the end.
    """

    reads: int
    sampled: bool
    features: frozenset[str]
    needed: int
    roomy: int
    floor: int
    wants: tuple[int, ...]
    scope: int
    whole: str = ""
    held: int = 0


def widest(specs: Specs, tensor: ResolvedTensor) -> int:
    """Bytes of the widest element of a tensor's sources, as they are read or made, and its result."""
    sizes = [specs.merge.inputs[s.input].tensors[s.tensor].dtype.itemsize for s in sources_of(tensor)]
    if tensor.name in specs.generated:
        sizes.append(specs.compute_of(tensor.name).itemsize)
    return max(tensor.dtype.itemsize, *sizes)


def survey(specs: Specs, method: Method) -> Survey:
    """Ask for every tensor of a merge.

    Raises
    ------
    ArgumentError : a parameter does not fit a tensor. InputError : tensors of one scope ask for unlike measurements.
    """
    merge = specs.merge
    if specs.whole is not None:
        return _of_whole(specs)
    common: Round | Coeffs | None = None
    shared = scope = held = 0
    if specs.model_scope is not None:
        members, common = specs.first_state(method)
        if isinstance(common, Round):
            scope = of_scope(method, members, common)
            # Sums of all tensors are held together, beside those of the tensors in work.
            shared = scope if is_sum(common) or common.op == "each" else 0
            held = of_coeffs(method, members, common)
    found = Needs(0)
    needed = roomy = 0
    reads, sampled = 1, False
    wants = []
    for index in specs.members:
        spec = specs.spec(index)
        state = common if common is not None else method.start(spec)
        tensor = merge.tensors[index]
        size = widest(specs, tensor)
        needs = of_tensor(method, spec, state, size)
        if tensor.name in specs.generated:
            needs = replace(needs, statistics=needs.statistics + specs.held(index))
            if specs.generated[tensor.name]:
                needs = replace(needs, features=needs.features | {"subtract"})
        found = found.joined(needs)
        needed, roomy = max(needed, needs.tile * size), max(roomy, needs.roomy * size)
        wants.append(needs.statistics + needs.entries)
        # Where a modifier measures what a method makes, this is a read of its own, unless it is the first.
        after = isinstance(method, Modified) and method.measures_after(spec.params, state)
        _, _, state = first_measured(method, spec, state)
        reads = max(reads, 1 + isinstance(state, Round) + after)
        if isinstance(state, Round):
            sampled = sampled or (state.selection is not None and state.selection.sample < 1.0)
    wants.sort(reverse=True)
    floor = found.statistics + shared + held
    return Survey(reads, sampled, found.features, needed, roomy, floor, tuple(wants), scope, held=held)


def _of_whole(specs: Specs) -> Survey:
    """What whole tensors need: the largest one sets the floor."""
    wants = sorted(((whole_bytes(specs, i), specs.merge.tensors[i].name) for i in specs.members), reverse=True)
    features = frozenset({"subtract"}) if any(specs.spec(i).has_base for i in specs.members[:1]) else frozenset()
    reads = 2 if specs.measures_matrices else 1
    most, name = wants[0] if wants else (0, "")
    return Survey(reads, False, features, 0, 0, most, tuple(w for w, _ in wants), 0, name)
