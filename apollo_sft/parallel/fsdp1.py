"""Sharding by FSDP1, torch's older `FullyShardedDataParallel`: the functions of `fsdp2`, and what sets the two apart.

FSDP1 lays the parameters of a group end to end and cuts that row of numbers into equal parts. So a rank holds of each
parameter one range of its flattened values, or nothing. `by_rows` gives the form that everything outside of a step
knows: DTensors cut along their first dim, as under FSDP2.
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
"""Parameters of different dtypes cannot lie end to end."""
WRAPPER = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names of parameters."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one parameter is cut: its whole shape, how many values each rank of the shard group holds, and this rank's
    place among them."""

    shape: torch.Size
    sizes: tuple[int, ...]
    rank: int

    @property
    def start(self) -> int:
        """The place of this rank's first value among all."""
        return sum(self.sizes[: self.rank])

    def mine(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1)[self.start : self.start + self.sizes[self.rank]]


class _Root(FullyShardedDataParallel):
    """The outermost group. `waiting`: gradients of earlier micro-batches, see `reduce_gradients`."""

    mesh: DeviceMesh
    cuts: dict[nn.Parameter, Cut]
    waiting: dict[nn.Parameter, Tensor]


def check(shard_size: int, compute_dtype: torch.dtype, reduces_once: bool) -> None:
    """What FSDP1 cannot do right, refused before a weight is read. `shard_size`: ranks that share one copy, or -1.

    Offload without the last of these is made right in `reduce_gradients`.
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
    """Wrap a model that lies on meta: the blocks that the spec chooses, and the rest, head included, as the root.

    Returns the wrapper. It has every attribute of the model; its weights are not filled yet.
    Raises: ConfigError when the spec chooses no block.
    """
    chosen = set(blocks(model, spec, head))
    hybrid = mesh.ndim == 2
    on_cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device(mesh.device_type)
    shapes: dict[nn.Parameter, torch.Size] = {}
    with warnings.catch_warnings():
        # That the gradient of a group takes memory for what is frozen in it, too: the docs say it.
        warnings.filterwarnings("ignore", ".*has both parameters with requires_grad", UserWarning)
        root = _Root(
            model,
            process_group=(mesh.get_group(1), mesh.get_group(0)) if hybrid else mesh.get_group(),
            sharding_strategy=_strategy(hybrid, spec.reshard_after_forward),
            auto_wrap_policy=CustomPolicy(lambda module: module in chosen),
            mixed_precision=MixedPrecision(spec.compute_dtype, spec.reduce_dtype, cast_forward_inputs=True),
            cpu_offload=CPUOffload(spec.offload and on_cuda),  # on a CPU there is nothing to move away
            device_id=device,
            param_init_fn=_materialise(device, shapes),
            use_orig_params=True,
        )
    root.mesh, root.waiting = mesh, {}
    root.cuts = _cuts(root, shapes, mesh)
    # The model's own methods call the model: through this wrapper, which gathers the root.
    for name in ("loss_sum", "next_tokens"):
        vars(root)[name] = MethodType(getattr(type(model), name), root)
    return cast(M, root)


def _strategy(hybrid: bool, reshard_after_forward: bool) -> ShardingStrategy:
    if hybrid:
        return ShardingStrategy.HYBRID_SHARD if reshard_after_forward else ShardingStrategy._HYBRID_SHARD_ZERO2
    return ShardingStrategy.FULL_SHARD if reshard_after_forward else ShardingStrategy.SHARD_GRAD_OP


def _materialise(device: torch.device, shapes: dict[nn.Parameter, torch.Size]) -> Callable[[nn.Module], None]:
    """For FSDP1, which calls it group by group and frees what it has cut: memory in the place of meta tensors.

    A weight that two modules share stays one. `shapes` is filled with what the parameters were.
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
    """Told by the ranks to each other: what FSDP1 itself knows of it is private."""
    group = mesh.get_group(mesh.ndim - 1)
    parameters = list(model.parameters())
    mine = torch.tensor([parameter.numel() for parameter in parameters], device=mesh.device_type)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    sizes = torch.stack(everyone, dim=1).tolist()
    return {p: Cut(shapes[p], tuple(s), group.rank()) for p, s in zip(parameters, sizes, strict=True)}


@torch.no_grad()
def fill(model: nn.Module, source: nn.Module | None, device: torch.device, offload: bool = False) -> None:
    """Give the shards their values, and the model its buffers, from rank 0, whose `source` holds them on the CPU.

    Tensors travel one by one, so that no other rank ever holds the whole model. `offload` changes nothing here: the
    shards lie where `shard` has put them.
    """
    del offload
    weights = {} if source is None else dict(source.named_parameters())
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
    """Whether the next backward reduces gradients over ranks. Without, they stay whole and add up on every rank.

    With offload, FSDP1 overwrites what an earlier backward has reduced: it is put aside here, and added in `grad_norm`.
    """
    root = cast(_Root, model)
    for parameter in root.parameters():
        if root.cpu_offload.offload_params and root._sync_gradients and parameter.grad is not None:
            _put_aside(root.waiting, parameter)
    for module in FullyShardedDataParallel.fsdp_modules(root):
        buffer = getattr(module._flat_param, "_cpu_grad", None)  # of offloaded gradients; stale, also after zero_grad
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
    """L2 norm over all ranks of the gradients, which are complete after it."""
    root = cast(_Root, model)
    for parameter, earlier in root.waiting.items():
        parameter.grad = earlier if parameter.grad is None else parameter.grad.add_(earlier)
    root.waiting.clear()
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=root.mesh.device_type)
    if grads:
        squares += get_total_norm(grads, foreach=True).to(squares.device, torch.float64) ** 2
    dist.all_reduce(squares, group=root.mesh.get_group(root.mesh.ndim - 1))
    return squares.sqrt().to(grads[0].dtype if grads else torch.float32)


def num_dims(model: nn.Module, parameter: nn.Parameter) -> int:
    """Of the whole parameter: its shard is flat."""
    return len(cast(_Root, model).cuts[parameter].shape)


def reshard(model: nn.Module) -> None:
    """Give up gathered weights: a forward without a backward leaves some."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        if module._handle is not None:
            _reshard(module, module._handle, True)


def by_rows(model: M, gradients: bool = False) -> M:
    """A copy of the model as FSDP2 would hold it, to be saved, exported or looked at: without wrappers. Collective.

    `gradients`: with those that the parameters have.
    """
    root = cast(_Root, model)
    rows = {}
    for parameter in root.parameters():
        rows[parameter] = nn.Parameter(_rows(root, parameter, parameter.detach()), parameter.requires_grad)
        if gradients and parameter.requires_grad:
            rows[parameter].grad = _rows(root, parameter, parameter.grad)
    return cast(M, _bare(root, rows))


def outline(model: M) -> M:
    """A copy of the model for its names, shapes and buffers: without wrappers, its parameters on meta."""
    cuts = cast(_Root, model).cuts
    empty = {p: torch.empty(cut.shape, dtype=p.dtype, device="meta") for p, cut in cuts.items()}
    return cast(M, _bare(model, {p: nn.Parameter(empty[p], p.requires_grad) for p in cuts}))


def held(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """What this rank holds of each parameter, by name: the flat position of its first value, and its values."""
    cuts = cast(_Root, model).cuts
    return {_plain(name): (cuts[p].start, p.detach()) for name, p in model.named_parameters()}


def _bare(module: nn.Module, parameters: dict[nn.Parameter, nn.Parameter]) -> nn.Module:
    twin = copy.copy(module.module if isinstance(module, FullyShardedDataParallel) else module)
    twin._parameters = {n: p if p is None else parameters[p] for n, p in twin._parameters.items()}
    twin._modules = {n: m if m is None else _bare(m, parameters) for n, m in twin._modules.items()}
    return twin


def optimizer_by_rows(model: nn.Module, rows: nn.Module, optimizer: Optimizer) -> Optimizer:
    """A copy of the optimizer, with its state, for the model that `by_rows` gave. Collective."""
    root = cast(_Root, model)
    pairs = [pair for pair in zip(root.parameters(), rows.parameters(), strict=True) if pair[0].requires_grad]
    twin = cast(Any, type(optimizer))([row for _, row in pairs])
    names: list[Any] = [None] * dist.get_world_size()
    # AdamW knows nothing of a parameter of which this rank holds no value.
    dist.all_gather_object(names, {n for state in optimizer.state.values() for n, v in state.items() if v.dim()})
    for parameter, row in pairs:
        state = optimizer.state.get(parameter, {})
        twin.state[row] = {name: _rows(root, parameter, state.get(name)) for name in sorted(set().union(*names))}
    return cast(Optimizer, twin)


@torch.no_grad()
def take_rows(model: nn.Module, optimizer: Optimizer, rows: nn.Module, rows_optimizer: Optimizer) -> None:
    """The way back: weights and optimizer state from copies that `by_rows` gave and that were filled. Collective."""
    cuts = cast(_Root, model).cuts
    for parameter, row in zip(model.parameters(), rows.parameters(), strict=True):
        if not parameter.requires_grad:
            continue
        parameter.copy_(cuts[parameter].mine(_full(row)))
        optimizer.state[parameter] = {
            name: cuts[parameter].mine(_full(value)).clone() if isinstance(value, DTensor) else value.clone()
            for name, value in rows_optimizer.state[row].items()
        }


def _full(rows: Tensor) -> Tensor:
    whole: Tensor = cast(Any, rows.detach()).full_tensor()
    return whole


def _rows(root: _Root, parameter: nn.Parameter, values: Tensor | None) -> DTensor:
    """From this rank's range of a parameter's values (None: zeros) to its rows of them."""
    cut, mesh = root.cuts[parameter], root.mesh
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
