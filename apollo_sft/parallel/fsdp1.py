"""Sharding by FSDP1, torch's older `FullyShardedDataParallel`: the functions of `fsdp2`, in the terms of FSDP1.

FSDP1 concatenates the flattened parameters of a group and cuts the result into equal parts. So a rank holds one range
of the flattened values of each parameter, or nothing. A group of `a` with shape (2, 3) and `b` with shape (4,), on two
ranks, for example:

    values    a a a a a | a b b b b
    rank 0    the first five values of a, nothing of b
    rank 1    the last value of a, and all of b

`as_row_sharded` gives the form that everything outside of a step uses: DTensors sharded along dim 0, as under FSDP2.
There, rank 0 holds row 0 of `a` and two values of `b`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from apollo_sft.errors import ConfigError
from apollo_sft.parallel.fsdp2 import ShardSpec, blocks, fill_buffers

M = TypeVar("M", bound=nn.Module)

MIXES_DTYPES = False
"""Parameters of different dtypes cannot be concatenated."""
WRAPPER = "_fsdp_wrapped_module."
"""The part that FSDP1 adds to the names of parameters."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The ranges into which one parameter is cut."""

    shape: torch.Size
    """The shape of the full parameter."""
    sizes: tuple[int, ...]
    """The number of values that each rank of the shard group holds."""
    rank: int
    """This rank's place in the shard group."""

    @property
    def start(self) -> int:
        """Return the position of this rank's first value among all."""
        return sum(self.sizes[: self.rank])

    def mine(self, whole: Tensor) -> Tensor:
        """Return this rank's range of the full parameter, flat."""
        return whole.reshape(-1)[self.start : self.start + self.sizes[self.rank]]


class _Root(FullyShardedDataParallel):
    """The outermost group."""

    mesh: DeviceMesh
    cuts: dict[nn.Parameter, Cut]
    waiting: dict[nn.Parameter, Tensor]
    """Gradients of earlier micro-batches, see `reduce_gradients`."""


def check(shard_size: int, compute_dtype: torch.dtype, reduces_once: bool) -> None:
    """Refuse what FSDP1 computes wrongly, before a weight is read. `shard_size`: ranks that share one copy, or -1.

    Raises: ConfigError.
    """
    if shard_size == 1:
        raise ConfigError(
            "model.strategy=fsdp cannot replicate without sharding",
            found="model.fsdp_config.fsdp_size=1",
            fix="model.fsdp_config.fsdp_size=2 or more, or model.strategy=fsdp2",
        )
    if reduces_once and compute_dtype == torch.bfloat16:
        raise ConfigError(
            "model.strategy=fsdp would add up the gradients of micro-batches in bf16",
            found="model.fsdp_config.use_no_sync_for_gradient_accumulation=true, forwards in bf16",
            fix="model.fsdp_config.use_no_sync_for_gradient_accumulation=false, model.fsdp_config.dtype=fp32, "
            "or model.strategy=fsdp2, which adds them up in fp32",
        )


def shard(model: M, mesh: DeviceMesh, spec: ShardSpec, head: nn.Module | None) -> M:
    """Wrap a model on meta: the blocks that the spec chooses, and the rest, head included, as the root.

    Return the wrapper. It has every attribute of the model; its weights are not filled yet.
    Raises: ConfigError when the spec chooses no block.
    """
    chosen = set(blocks(model, spec, head))
    hybrid = mesh.ndim == 2
    on_cuda = mesh.device_type == "cuda"
    device = torch.device(mesh.device_type)
    if on_cuda:
        device = torch.device("cuda", torch.cuda.current_device())

    shapes: dict[nn.Parameter, torch.Size] = {}

    with warnings.catch_warnings():
        # It warns that the gradient of a group takes memory for frozen parameters too: our docs state that.
        warnings.filterwarnings("ignore", ".*has both parameters with requires_grad", UserWarning)
        root = _Root(
            model,
            process_group=(mesh.get_group(1), mesh.get_group(0)) if hybrid else mesh.get_group(),
            sharding_strategy=_strategy(hybrid, spec.reshard_after_forward),
            auto_wrap_policy=CustomPolicy(lambda module: module in chosen),
            mixed_precision=MixedPrecision(spec.compute_dtype, spec.reduce_dtype, cast_forward_inputs=True),
            cpu_offload=CPUOffload(spec.offload and on_cuda),  # on a CPU nothing has to be offloaded
            device_id=device,
            param_init_fn=_materialise(device, shapes),
            use_orig_params=True,
        )

    root.mesh = mesh
    root.waiting = {}
    root.cuts = _cuts(root, shapes, mesh)
    # Bound to the wrapper: these methods call `self`, and only the call of the wrapper gathers the root.
    for name in ("loss_sum", "next_tokens"):
        vars(root)[name] = MethodType(getattr(type(model), name), root)

    return cast(M, root)


def _strategy(hybrid: bool, reshard_after_forward: bool) -> ShardingStrategy:
    strategies = {
        (True, True): ShardingStrategy.HYBRID_SHARD,
        (True, False): ShardingStrategy._HYBRID_SHARD_ZERO2,
        (False, True): ShardingStrategy.FULL_SHARD,
        (False, False): ShardingStrategy.SHARD_GRAD_OP,
    }
    return strategies[hybrid, reshard_after_forward]


def _materialise(device: torch.device, shapes: dict[nn.Parameter, torch.Size]) -> Callable[[nn.Module], None]:
    """Return the function by which FSDP1 replaces meta tensors, group by group: it frees a group once it is cut.

    A weight that two modules share stays one. `shapes` is filled with the shapes of the full parameters.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}

    def give_memory(module: nn.Module) -> None:
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty not in made:
                made[empty] = nn.Parameter(torch.empty_like(empty, device=device), empty.requires_grad)
                shapes[made[empty]] = empty.shape
            setattr(module, name, made[empty])

    return give_memory


def _cuts(model: nn.Module, shapes: dict[nn.Parameter, torch.Size], mesh: DeviceMesh) -> dict[nn.Parameter, Cut]:
    """Find out the ranges of all parameters. Collective: FSDP1's own record of them is private."""
    group = mesh.get_group(mesh.ndim - 1)
    parameters = list(model.parameters())
    mine = torch.tensor([parameter.numel() for parameter in parameters], device=mesh.device_type)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)

    # One row for each parameter, one column for each rank.
    sizes = torch.stack(everyone, dim=1).tolist()
    return {p: Cut(shapes[p], tuple(s), group.rank()) for p, s in zip(parameters, sizes, strict=True)}


@torch.no_grad()
def fill(model: nn.Module, source: nn.Module | None, device: torch.device, offload: bool = False) -> None:
    """Give the shards their values, and the model its buffers, from rank 0, whose `source` holds them on the CPU.

    Tensors travel one by one, so that no other rank ever holds the whole model. `offload` has no effect here: the
    shards are where `shard` has put them.
    """
    del offload
    weights: dict[str, nn.Parameter] = {}
    if source is not None:
        weights = dict(source.named_parameters())

    for name, parameter in model.named_parameters():
        cut = cast(_Root, model).cuts[parameter]
        whole = torch.empty(cut.shape, dtype=parameter.dtype, device=device)
        if source is not None:
            whole.copy_(weights[_plain(name)])
        dist.broadcast(whole, src=0)
        parameter.copy_(cut.mine(whole))

    fill_buffers(model, source, device, _plain)


def _plain(name: str) -> str:
    return name.replace(WRAPPER, "")


def reduce_gradients(model: nn.Module, wanted: bool) -> None:
    """Set whether the next backward reduces gradients over ranks. Without it, full ones add up on every rank."""
    root = cast(_Root, model)

    # With offload, FSDP1 overwrites the gradients that an earlier backward has reduced. They are kept, and `grad_norm`
    # adds them.
    for parameter in root.parameters():
        if root.cpu_offload.offload_params and root._sync_gradients and parameter.grad is not None:
            _put_aside(root.waiting, parameter)

    for module in FullyShardedDataParallel.fsdp_modules(root):
        # The buffer of offloaded gradients keeps its old values, also after zero_grad.
        buffer = getattr(module._flat_param, "_cpu_grad", None)
        if buffer is not None:
            buffer.zero_()
        vars(module)["_sync_gradients"] = wanted  # as the context manager `no_sync` does


def _put_aside(waiting: dict[nn.Parameter, Tensor], parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    if parameter in waiting:
        waiting[parameter] += parameter.grad
    else:
        waiting[parameter] = parameter.grad.clone()
    parameter.grad = None


def grad_norm(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Complete the gradients, and return their L2 norm over all ranks."""
    root = cast(_Root, model)
    for parameter, earlier in root.waiting.items():
        if parameter.grad is None:
            parameter.grad = earlier
        else:
            parameter.grad.add_(earlier)

    root.waiting.clear()

    # A rank without a gradient takes part in the sum all the same. In float64, since squares may overflow float32.
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=root.mesh.device_type)
    if grads:
        squares += get_total_norm(grads, foreach=True).to(squares.device, torch.float64) ** 2

    dist.all_reduce(squares, group=root.mesh.get_group(root.mesh.ndim - 1))

    dtype = grads[0].dtype if grads else torch.float32
    return squares.sqrt().to(dtype)


def num_dims(model: nn.Module, parameter: nn.Parameter) -> int:
    """Return the number of dims of the full parameter; its shard is flat."""
    return len(cast(_Root, model).cuts[parameter].shape)


def reshard(model: nn.Module) -> None:
    """Free gathered weights: a forward without a backward leaves some."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        if module._handle is not None:
            _reshard(module, module._handle, True)


def as_row_sharded(model: M, gradients: bool = False) -> M:
    """Return a copy of the model as FSDP2 would hold it, to be saved or exported: without wrappers. Collective.

    `gradients`: with the gradients that the parameters have.
    """
    root = cast(_Root, model)
    rows = {}
    for parameter in root.parameters():
        rows[parameter] = nn.Parameter(_rows(root, parameter, parameter.detach()), parameter.requires_grad)
        if gradients and parameter.requires_grad:
            rows[parameter].grad = _rows(root, parameter, parameter.grad)
    return cast(M, _bare(root, rows))


def outline(model: M) -> M:
    """Return a copy of the model for its names, shapes and buffers: without wrappers, its parameters on meta."""
    empty = {}
    for parameter, cut in cast(_Root, model).cuts.items():
        on_meta = torch.empty(cut.shape, dtype=parameter.dtype, device="meta")
        empty[parameter] = nn.Parameter(on_meta, parameter.requires_grad)
    return cast(M, _bare(model, empty))


def held(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Return this rank's part of each parameter, by name: the flat position of its first value, and its values."""
    cuts = cast(_Root, model).cuts
    return {_plain(name): (cuts[p].start, p.detach()) for name, p in model.named_parameters()}


def _bare(module: nn.Module, parameters: dict[nn.Parameter, nn.Parameter]) -> nn.Module:
    """Copy a tree of modules without FSDP1's wrappers, with other parameters in the place of its own."""
    inner = module.module if isinstance(module, FullyShardedDataParallel) else module

    # A shallow copy shares the dictionaries of parameters and modules: both are replaced, never changed.
    twin = copy.copy(inner)
    twin._parameters = {name: p if p is None else parameters[p] for name, p in inner._parameters.items()}
    twin._modules = {name: m if m is None else _bare(m, parameters) for name, m in inner._modules.items()}
    return twin


def optimizer_as_row_sharded(model: nn.Module, rows: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Return a copy of the optimizer, with its state, for the parameters of `as_row_sharded`. Collective."""
    root = cast(_Root, model)
    pairs = [pair for pair in zip(root.parameters(), rows.parameters(), strict=True) if pair[0].requires_grad]
    twin = cast(Any, type(optimizer))([row for _, row in pairs])

    # AdamW makes no state for a parameter of which this rank holds no value. All ranks must gather the same moments,
    # so they agree on the names. A state without dims is the step, which is not sharded.
    mine: set[str] = set()
    for state in optimizer.state.values():
        mine.update(name for name, value in state.items() if value.dim())

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    moments = sorted(set().union(*everyone))

    for parameter, row in pairs:
        state = optimizer.state.get(parameter, {})
        twin.state[row] = {name: _rows(root, parameter, state.get(name)) for name in moments}

    return cast(Optimizer, twin)


@torch.no_grad()
def load_row_sharded(model: nn.Module, optimizer: Optimizer, rows: nn.Module, rows_optimizer: Optimizer) -> None:
    """Load weights and optimizer state from copies of `as_row_sharded` that were filled. Collective."""
    cuts = cast(_Root, model).cuts
    for parameter, row in zip(model.parameters(), rows.parameters(), strict=True):
        if not parameter.requires_grad:
            continue

        cut = cuts[parameter]
        parameter.copy_(cut.mine(_full(row)))

        # Cloned: a range of the gathered tensor would keep all of it in memory.
        state = {}
        for name, value in rows_optimizer.state[row].items():
            held_here = cut.mine(_full(value)) if isinstance(value, DTensor) else value
            state[name] = held_here.clone()

        optimizer.state[parameter] = state


def _full(rows: Tensor) -> Tensor:
    whole: Tensor = cast(Any, rows.detach()).full_tensor()
    return whole


def _rows(root: _Root, parameter: nn.Parameter, values: Tensor | None) -> DTensor:
    """Return this rank's rows of a tensor of which each rank has its range of values (None: zeros). Collective."""
    cut = root.cuts[parameter]
    mesh = root.mesh

    # A gathering takes equal parts: ranges are padded to the longest one, and cut again.
    padded = torch.zeros(max(cut.sizes), dtype=parameter.dtype, device=mesh.device_type)
    if values is not None:
        padded[: values.numel()] = values.reshape(-1)

    gathered = padded.new_empty(len(cut.sizes) * padded.numel())
    dist.all_gather_single(gathered, padded, group=mesh.get_group(mesh.ndim - 1))
    parts = gathered.view(len(cut.sizes), padded.numel())
    whole = torch.cat([part[:size] for part, size in zip(parts, cut.sizes, strict=True)]).view(cut.shape)

    placements: list[Placement] = [*(Replicate() for _ in range(mesh.ndim - 1)), Shard(0)]
    rows = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return cast(DTensor, rows.to(parameter.device))
