"""The loaders of a run: how its steps are divided over the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from apollo_sft.config.schema import DataConfig, SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import PlanSpec, attention_cost
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh, build_mesh
from apollo_sft.train.prepare_run import Prepared

if TYPE_CHECKING:
    from apollo_sft.data.batch.mixture import Mixture


def plan_spec(data: DataConfig, seed: int, mesh: Mesh, hf_config: Any, sources: Mixture | None = None) -> PlanSpec:
    """Return how the steps of a training are laid out over this mesh. `sources`: of its data, where they have names."""
    return PlanSpec(
        batch_size=data.train_batch_size,
        micro_batch_size=data.micro_batch_size_per_gpu,
        dp_size=mesh.dp_size,
        seed=seed,
        drop_last=data.drop_last,
        max_tokens=data.max_token_len_per_gpu and data.max_token_len_per_gpu * mesh.sp_size,
        balance=data.balance_dp_token,
        attention_cost=attention_cost(hf_config.get_text_config().hidden_size),
        mixture=sources,
    )


def lay_out(config: SftConfig, prepared: Prepared, world: World) -> tuple[Mesh, Loader, Loader | None]:
    """Build the mesh, the loader of the training data, and that of the validation data, if there is any."""
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
    pinned = world.device.type == "cuda"
    spec = plan_spec(config.data, config.trainer.seed, mesh, prepared.hf_config, prepared.train_sources)
    train = Loader(prepared.train, spec, mesh.dp_rank, mesh.sp_size, pinned)
    if prepared.val is None:
        return mesh, train, None

    every_row_once = replace(
        spec,
        batch_size=spec.micro_batch_size * mesh.dp_size,
        shuffle=False,
        drop_last=False,
        mixture=prepared.val_sets,
    )
    return mesh, train, Loader(prepared.val, every_row_once, mesh.dp_rank, mesh.sp_size, pinned)
