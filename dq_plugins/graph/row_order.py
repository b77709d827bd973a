"""Where the samples of a batch are in the input of each layer, seen by changing one of them.

Layers need not see samples one after the other: some transformers compute on ``[S, B, C]``, others fold a sequence into
the batch in either order. Two calls are made that differ in the first sample alone: the rows of a layer's input that
differ are that sample's.

Shapes: ``B`` samples of a call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.compiled import evaluating, unwrap
from dq_plugins.graph.arguments import map_leaves, named_leaves, number_to_tensor, value_of
from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import LayerKind, kind_of
from dq_plugins.timesteps import RowOrder

Seen = Mapping[str, list[Tensor]]
"""By layer, for each of its uses, a number for every row ``[d0]``, or ``[d0, d1]`` of an input of more dimensions."""


@torch.no_grad()
def find_row_orders(
    denoiser: nn.Module, example_inputs: Mapping[str, Any], timestep: str, sample: str, layers: Iterable[str]
) -> dict[str, RowOrder | None]:
    """Where samples are in the inputs of layers, see `dq_plugins.timesteps.RowOrder`; None where that is not known.

    Args:
        denoiser: with real weights; it is run a few times and left as it was.
        example_inputs: keyword arguments of one call.
        timestep: name of the timestep argument.
        sample: name of the argument through which the noisy sample enters; where it is not known, the largest is it.
        layers: fully qualified names; of modules that are no layers, where rows are dimension 0.
    """
    denoiser = unwrap(denoiser)
    modules = {name: unwrap(denoiser.get_submodule(name)) for name in layers}
    for inputs, batch in _batches(number_to_tensor(dict(example_inputs), timestep), timestep, sample):
        try:
            return _compare(denoiser, modules, inputs, batch, timestep)
        except Exception:  # whatever the model's code raises: it takes no such call
            continue
    return dict.fromkeys(modules)


def _compare(
    denoiser: nn.Module, modules: Mapping[str, nn.Module], inputs: dict[str, Any], batch: int, timestep: str
) -> dict[str, RowOrder | None]:
    """The orders in one call and in another whose first sample differs."""
    found: dict[str, RowOrder | None] = {}
    one, failed = _seen(denoiser, modules, inputs), list[Exception]()
    for integers in (False, True):  # with them second: lengths and masks may move the rows of all
        changed = _with_another_sample(inputs, batch, timestep, integers)
        if changed is None:
            continue
        try:
            two = _seen(denoiser, modules, changed)
        except Exception as error:  # an index that no table has
            failed.append(error)
            continue
        orders = {name: _order(one[name], two[name], batch) for name in modules}
        found = {name: _clearer(found.get(name), order) for name, order in orders.items()}
        if not {None, "mixed"} & set(found.values()):
            break
    if not found and failed:
        raise failed[0]
    return found


def _clearer(one: RowOrder | None, two: RowOrder | None) -> RowOrder | None:
    """Of what two changes of a sample tell about a layer, what says more."""
    return two if one is None or (one == "mixed" and two is not None) else one


def _batches(inputs: dict[str, Any], timestep: str, sample: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Calls of several samples: of two, and of all where it has to be; with a timestep for each, and as it came."""
    tensors = [x for name, x in named_leaves(inputs) if isinstance(x, Tensor) and x.dim() and name != timestep]
    entry = value_of(inputs, sample) if sample else max(tensors, key=Tensor.numel, default=None)
    if not isinstance(entry, Tensor) or not entry.dim() or not len(entry):
        return
    recorded = len(entry)
    # of a guided call one sample of each half
    pair = _mapped(inputs, lambda _, x: x[[0, -1]] if x.dim() and len(x) == recorded else x)
    for given, batch in [(pair, 2), (inputs, recorded)][: 1 if recorded <= 2 else 2]:

        def for_each(name: str, x: Tensor, batch: int = batch) -> Tensor:
            return x.reshape(1).expand(batch) if name == timestep and x.numel() == 1 else x

        yield _mapped(given, for_each), batch
        yield given, batch


def _with_another_sample(inputs: dict[str, Any], batch: int, timestep: str, integers: bool) -> dict[str, Any] | None:
    """The call with another first sample, of whose ``integers`` the values may change, too; None: it has none."""
    generator, indices = torch.Generator().manual_seed(0), list[str]()

    def changed(name: str, x: Tensor) -> Tensor:
        if not x.dim() or len(x) != batch or x.dtype == torch.bool or x.is_complex():
            return x
        x, first = x.clone(), x[0]
        if name == timestep:  # lower: it stays in the range of timesteps
            x[0] = first / 2 if x.is_floating_point() else first // 2
        elif x.is_floating_point():
            noise = torch.randn(first.shape, generator=generator).to(first)
            x[0] = 0.7 * first + 0.2 * noise  # other values even where these are the same random numbers
        elif integers:
            indices.append(name)
            x[0] = torch.where(first > 0, first - 1, first + 1)  # another index, mostly of a table that has it
        return x

    found = _mapped(inputs, changed)
    return found if indices or not integers else None


def _mapped(inputs: dict[str, Any], function: Any) -> dict[str, Any]:
    return map_leaves(inputs, lambda name, value: function(name, value) if isinstance(value, Tensor) else value)


def _seen(denoiser: nn.Module, modules: Mapping[str, nn.Module], inputs: dict[str, Any]) -> Seen:
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            seen[name].append(_numbers(x.detach(), kind_of(modules[name])))

    copies = _mapped(inputs, lambda _, x: x.clone())  # a forward may change its arguments in place
    with torch.random.fork_rng(), hooked(modules, before=see, first=True), evaluating(denoiser):
        torch.manual_seed(0)
        denoiser(**copies)
    # A cache of diffusers would count this call as the first step of the next sampling run: told as pipelines tell it.
    getattr(denoiser, "_reset_stateful_cache", lambda: None)()
    return seen


def _numbers(x: Tensor, kind: LayerKind | None) -> Tensor:
    """A number for each row: equal rows have equal ones, and others hardly ever. Without a kind, as of images."""
    lookup, spatial = (False, x.dim() - 2) if kind is None else (kind.lookup, kind.spatial)
    lead = 1 if spatial else min(2, x.dim() - (not lookup))
    if x.dim() < lead + (not lookup) or (spatial and x.dim() != spatial + 2):
        return x.new_zeros(0)
    flat = x.reshape(*x.shape[:lead], -1).float()
    factors = torch.rand(flat.shape[-1], generator=torch.Generator().manual_seed(0)).to(flat.device) + 0.5
    return (flat * factors).sum(-1).cpu()


def _order(one: list[Tensor], two: list[Tensor], batch: int) -> RowOrder | None:
    """The order of all uses of a layer together."""
    uses = list(zip(one, two, strict=False))
    if not one or len(one) != len(two) or any(a.shape != b.shape or not a.numel() for a, b in uses):
        return None
    orders = {_order_of_rows((a != b) & ~(a.isnan() & b.isnan()), batch) for a, b in uses}
    return orders.pop() if len(orders) == 1 else "mixed"


def _order_of_rows(changed: Tensor, batch: int) -> RowOrder | None:
    """The order in which the first sample has the rows that changed, ``[d0]`` or ``[d0, d1]``."""
    rows = changed if changed.dim() == 1 else changed.any(1)  # [d0]
    place, expected = torch.arange(len(rows)), dict[RowOrder, tuple[Tensor, Tensor]]()
    if len(rows) % batch == 0:
        expected["first"] = rows, place < len(rows) // batch
        if len(rows) > batch:
            expected["fastest"] = rows, place % batch == 0
    if changed.dim() == 2 and changed.shape[1] == batch:
        expected["second"] = changed.any(0), torch.arange(batch) == 0
    if not bool(changed.any()):
        return "first" if len(rows) == batch and "second" not in expected else None
    exact = [order for order, (found, wanted) in expected.items() if torch.equal(found, wanted)]
    possible = [order for order, (found, wanted) in expected.items() if not bool((found & ~wanted).any())]
    chosen = exact[:1] or possible
    return chosen[0] if len(chosen) == 1 else None if chosen else "mixed"
