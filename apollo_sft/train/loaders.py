"""What reads the batches of a run: how its steps are laid out over the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.mixture import Mixture
from apollo_sft.data.batch.plan import PlanSpec, attention_cost
from apollo_sft.parallel.mesh import Mesh
from apollo_sft.train.prepare_run import Prepared


def plan_spec(config: SftConfig, mesh: Mesh, hf_config: Any, sources: Mixture | None = None) -> PlanSpec:
    """How the steps of a training are laid out over this mesh. `sources`: those of its data, where they have names."""
    data = config.data
    return PlanSpec(
        batch_size=data.train_batch_size,
        micro_batch_size=data.micro_batch_size_per_gpu,
        dp_size=mesh.dp_size,
        seed=config.trainer.seed,
        drop_last=data.drop_last,
        max_tokens=data.max_token_len_per_gpu and data.max_token_len_per_gpu * mesh.sp_size,
        balance=data.balance_dp_token,
        attention_cost=attention_cost(hf_config.get_text_config().hidden_size),
        mixture=sources,
    )


def build_loaders(config: SftConfig, prepared: Prepared, mesh: Mesh, pinned: bool) -> tuple[Loader, Loader | None]:
    spec = plan_spec(config, mesh, prepared.hf_config, prepared.train_sources)
    train = Loader(prepared.train, spec, mesh.dp_rank, mesh.sp_size, pinned)
    if prepared.val is None:
        return train, None
    every_row_once = replace(
        spec,
        batch_size=spec.micro_batch_size * mesh.dp_size,
        shuffle=False,
        drop_last=False,
        mixture=prepared.val_sets,
    )
    return train, Loader(prepared.val, every_row_once, mesh.dp_rank, mesh.sp_size, pinned)
