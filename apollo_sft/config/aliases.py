"""The spellings of verl and AlphaApollo, in one table. Applied to parsed overrides, before the yaml is composed."""

from __future__ import annotations

RENAMED = {
    "data.micro_batch_size": "data.micro_batch_size_per_gpu",
    "optim.lr_warmup_steps_ratio": "optim.warmup_steps_ratio",
    "optim.optimizer": "optim.name",
    "optim.lr_scheduler_type": "optim.lr_scheduler",
    "model.path": "model.partial_pretrain",
    "model.custom_chat_template": "data.chat_template",
    "model.use_remove_padding": "use_remove_padding",
    "data.messages_key": "data.multiturn.messages_key",
    "data.tools_key": "data.multiturn.tools_key",
    "data.enable_thinking_key": "data.multiturn.enable_thinking_key",
    "model.fsdp_config.transformer_layer_cls_to_wrap": "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap",
    "trainer.n_gpus": "trainer.n_gpus_per_node",
}
"""Another name for the same key."""

WITHOUT_EFFECT = {
    "data.use_shm": "data files are memory-mapped",
    "model.use_shm": "weights are read once, by rank 0",
    "data.pad_mode": "there never is padding",
    "data.num_workers": "batches are read ahead by one thread",
    "trainer.balance_batch": "see data.balance_dp_token",
}
"""Keys that are accepted, with a note that they have no effect, and the reason."""

REFUSED = {
    "trainer.resume_path": "use trainer.resume_mode and trainer.resume_from_path",
    "trainer.checkpoint.load_contents": "a checkpoint is always loaded whole; choose what is saved",
    "data.ignore_input_ids_mismatch": "targets are proven on every row; a row that cannot be proven is refused",
    "optim.optimizer_impl": "use optim.name",
    "optim.override_optimizer_config": "use the keys of optim",
    "optim.total_training_steps": "use trainer.total_training_steps",
    "optim.warmup_style": "use optim.lr_scheduler",
    "optim.num_cycles": "the cosine has one half period; use optim.min_lr_ratio for its end",
    "engine.strategy": "use model.strategy",
    "engine.seed": "use trainer.seed",
    "engine.dtype": "use model.fsdp_config.dtype",
    "engine.model_dtype": "use model.fsdp_config.model_dtype",
    "engine.fsdp_size": "use model.fsdp_config.fsdp_size",
    "engine.reshard_after_forward": "use model.fsdp_config.reshard_after_forward",
    "engine.param_offload": "use model.fsdp_config.cpu_offload",
    "engine.ulysses_sequence_parallel_size": "use ulysses_sequence_parallel_size",
    "model.tokenizer_path": "the tokenizer is in the folder of model.partial_pretrain",
    "model.enable_activation_offload": "use model.enable_gradient_checkpointing",
}
"""Keys that are not accepted, and what to do instead."""

REFUSED_SECTIONS = {
    "engine": "the keys of sharding and dtype are below model.fsdp_config; apollo-sft train --help lists every key",
    "actor_rollout_ref": "that is a key of the RL trainer; here the model is model.partial_pretrain",
    "algorithm": "that is a key of the RL trainer",
    "critic": "that is a key of the RL trainer",
    "reward_model": "that is a key of the RL trainer",
    "hydra": "Hydra reads the command line here, but does not run the program: it has no folder and no log to set",
}
"""Sections that are not accepted as a whole, for the keys that no other table names."""
