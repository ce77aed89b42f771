"""The cells of `test_layouts`: what is laid out (models), and how (overrides of the config)."""

MODELS = {
    "gqa": ("Qwen2", {}),
    "mha-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": 4}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "nine-heads": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}),
    "window-tied": ("Mistral", {"sliding_window": 5, "tie_word_embeddings": True}),
    "sinks-experts": ("GptOss", {"num_local_experts": 4, "head_dim": 8, "sliding_window": 5}),
    "lora": ("Qwen2", {}),
    "lora-head": ("Llama", {}),
    "dora-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "lora-experts": (
        "Qwen3Moe",
        {"num_experts": 5, "moe_intermediate_size": 24, "head_dim": 8, "num_experts_per_tok": 2},
    ),
}
ADAPTERS = {
    "lora": {},
    "lora-head": {"target_modules": ["q_proj", "down_proj", "lm_head", "embed_tokens"], "use_rslora": True},
    "dora-tied": {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "lora-experts": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
}
"""Settings of the adapters of those that have one."""
WHOLE = ("gqa", "lora")
WHOLE_STRATEGIES = ("one process", "fsdp2", "fsdp", "hsdp", "fsdp2 + offload")
"""The models and the strategies that have the product of all axes; the rest have some in turn."""

CHECKPOINTING = "model.enable_gradient_checkpointing=true"
SELECTIVE = "model.gradient_checkpointing_policy=selective"
NO_SYNC = "model.fsdp_config.use_no_sync_for_gradient_accumulation=true"
OFFLOAD = "model.fsdp_config.cpu_offload=true"
KEEP = "model.fsdp_config.reshard_after_forward=false"
TOKENS = ["data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=200"]
BALANCE = "data.balance_dp_token=true"
LARGE = "model.fsdp_config.wrap_policy.min_num_params=1500"
HYBRID = "model.fsdp_config.fsdp_size=2"
FSDP1 = "model.strategy=fsdp"

STRATEGIES = {
    "one process": [],
    "fsdp2": [],
    "fsdp": [FSDP1],
    "hsdp": [HYBRID],
    "fsdp, hybrid": [FSDP1, HYBRID],
    "fsdp2 + offload": [OFFLOAD],
    "fsdp + offload": [FSDP1, OFFLOAD],
}
Layout = tuple[int, int, str]
"""Data ranks, sequence ranks, strategy."""
Cells = dict[str, list[list[str]]]
"""Name of a model -> overrides of each of its cells."""


def sp(size: int) -> str:
    return f"ulysses_sequence_parallel_size={size}"


def micro(size: int) -> str:
    return f"data.micro_batch_size_per_gpu={size}"


SWITCHES: list[list[str]] = [[], [CHECKPOINTING], [NO_SYNC], [CHECKPOINTING, NO_SYNC]]
EXTRAS = ([KEEP], [LARGE], [BALANCE])
BATCHING = [[micro(1)], [micro(2)], [micro(4)], [micro(8)], TOKENS]

COVERING: dict[int, Cells] = {
    1: {
        "gqa": [[micro(1)], [micro(8), CHECKPOINTING], [*TOKENS]],
        "mha-tied": [[micro(3)], [OFFLOAD, NO_SYNC, micro(2)]],
        "mqa": [[micro(8)]],
        "window-tied": [[micro(4)]],
        "sinks-experts": [[micro(4)]],
        "lora": [[micro(3), CHECKPOINTING], TOKENS],
        "lora-head": [[micro(3)]],
        "dora-tied": [[micro(3)]],
        "lora-experts": [[micro(3), CHECKPOINTING]],
    },
    2: {
        "gqa": [
            [micro(4)],
            [micro(8), NO_SYNC, CHECKPOINTING],
            [sp(2), micro(8)],
            [LARGE, micro(8)],
            [BALANCE, *TOKENS],
            [FSDP1, *TOKENS],
            [sp(2), CHECKPOINTING, SELECTIVE, micro(8)],
            [FSDP1, sp(2), NO_SYNC, micro(8)],
            [FSDP1, OFFLOAD, CHECKPOINTING, micro(8)],
            [LARGE, CHECKPOINTING, SELECTIVE, *TOKENS],
            [FSDP1, LARGE, CHECKPOINTING, SELECTIVE, sp(2), micro(8)],
        ],
        "mha-tied": [
            [micro(3), OFFLOAD],
            [sp(2), NO_SYNC, KEEP, micro(8)],
            [LARGE, micro(8)],
            [FSDP1, LARGE, KEEP, micro(8)],
        ],
        "nine-heads": [[sp(2), *TOKENS]],
        "window-tied": [[sp(2), micro(8)]],
        "sinks-experts": [[sp(2), micro(8)]],
        "lora": [
            [micro(8)],
            [sp(2), OFFLOAD, micro(8)],
            [LARGE, CHECKPOINTING, NO_SYNC, micro(8)],
            [FSDP1, *TOKENS],
        ],
        "lora-head": [[sp(2), micro(8), CHECKPOINTING], [LARGE, OFFLOAD, *TOKENS], [FSDP1, micro(8)]],
        "dora-tied": [[sp(2), *TOKENS, CHECKPOINTING], [NO_SYNC, OFFLOAD, micro(4)], [FSDP1, micro(8)]],
        "lora-experts": [[micro(8)], [sp(2), OFFLOAD, CHECKPOINTING, *TOKENS], [FSDP1, micro(8), NO_SYNC]],
    },
    4: {
        "gqa": [
            [sp(4), micro(8)],
            [sp(2), HYBRID, micro(8), CHECKPOINTING],
            [HYBRID, OFFLOAD, NO_SYNC, micro(4)],
            [FSDP1, HYBRID, sp(2), *TOKENS],
        ],
        "mha-tied": [[micro(4), BALANCE], [sp(2), *TOKENS, BALANCE, NO_SYNC]],
        "mqa": [[sp(4), *TOKENS]],
        "nine-heads": [[sp(4), micro(8)]],
        "lora": [[sp(2), HYBRID, NO_SYNC, micro(8)], [BALANCE, *TOKENS]],
        "lora-experts": [[sp(2), HYBRID, micro(8)]],
    },
}
"""Processes -> cells; each choice at least once, with others beside it."""


def layouts(processes: int) -> list[Layout]:
    """Every mesh of that many processes with every strategy that can be made of it. At 8, one set."""
    if processes == 1:
        return [(1, 1, "one process"), (1, 1, "fsdp2 + offload")]
    names = ["fsdp2", "fsdp", "fsdp2 + offload", "fsdp + offload"]
    if processes >= 4:
        names += ["hsdp", "fsdp, hybrid"]
    if processes == 8:
        names = ["fsdp2", "fsdp", "hsdp"]
    sizes = [size for size in (1, 2, 4, 8) if size <= processes]
    return [(processes // size, size, name) for size in sizes for name in names]


def layout_of(processes: int, overrides: list[str]) -> Layout:
    """The reverse: which of the layouts a cell belongs to."""
    size = next((int(text.partition("=")[2]) for text in overrides if text.startswith("ulysses")), 1)
    chosen = [text for text in overrides if text in (FSDP1, HYBRID, OFFLOAD)]
    alone = processes == 1 and not chosen
    names = [name for name, keys in STRATEGIES.items() if sorted(keys) == sorted(chosen)]
    return processes // size, size, "one process" if alone else names[-1]


def full_grid(processes: int) -> Cells:
    """All of it, for the long run."""
    if processes == 8:
        placed = [place(layout) for layout in layouts(8)]
        return {name: [[*where, *how] for where in placed for how in ([micro(2), NO_SYNC], TOKENS)] for name in WHOLE}
    whole: list[list[str]] = []
    for layout in layouts(processes):
        batching = BATCHING if layout[2] in WHOLE_STRATEGIES else [TOKENS]
        whole += [[*place(layout), *more, *how] for more in SWITCHES for how in batching]
        whole += [[*place(layout), *more, *TOKENS] for more in EXTRAS]
    cells: Cells = {name: list(whole) for name in WHOLE}
    for turn, name in enumerate(MODELS):
        if name not in WHOLE:
            cells[name] = [
                [*place(layout), *SWITCHES[(number + turn) % 4], *BATCHING[(number + turn) % 5]]
                for number, layout in enumerate(layouts(processes))
            ]
    return cells


def place(layout: Layout) -> list[str]:
    return [sp(layout[1]), *STRATEGIES[layout[2]]]
