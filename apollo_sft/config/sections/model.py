"""The section `model`: the weights that are trained, how they are divided, and how layers are computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from apollo_sft.config.keys import (
    AS_SET,
    LAYOUT,
    MODEL,
    NOTHING,
    NUMERICS,
    TOKENS,
    Key,
    Section,
    unused_with,
    unused_without,
)
from apollo_sft.config.schema_types import Count, CountOrAll, PathText, Strings, Text, short_dtype

LORA = "model.lora_rank=16"
UNUSED_WITHOUT_LORA = unused_with("model.lora_rank=0", remedy=LORA)


class WrapPolicyConfig(Section):
    """Which modules are sharded, each as one unit."""

    min_num_params: Annotated[int, Field(ge=0), Key(changes=LAYOUT, neutral=0, example="100000000")] = 0
    """Shard every module with at least this many parameters instead of every layer; 0 shards every layer."""

    transformer_layer_cls_to_wrap: Annotated[
        Strings, Key(changes=LAYOUT, neutral=AS_SET, example="[Qwen2DecoderLayer]", written="null")
    ] = ()
    """Class names of the layers, for example [Qwen2DecoderLayer]; null takes those that the model itself names."""


class FsdpConfig(Section):
    """How weights are divided over ranks, and their dtypes."""

    wrap_policy: WrapPolicyConfig

    cpu_offload: Annotated[bool, Key(changes=LAYOUT, neutral=False)] = False
    """Keep parameters, gradients and optimizer state on the CPU: less GPU memory, slower steps."""

    offload_params: Annotated[bool, Key(changes=LAYOUT, neutral=False)] = False
    """The same switch under its other name. One of the two is enough."""

    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp64"],
        BeforeValidator(short_dtype),
        Key(changes=NUMERICS, example="bf16", needs="model.fsdp_config.model_dtype=fp32"),
    ] = "auto"
    """Dtype of forward and backward: auto (bf16 on CUDA, fp32 on CPU), fp32, bf16, fp64."""

    model_dtype: Annotated[
        Literal["fp32", "fp64", "bf16"],
        BeforeValidator(short_dtype),
        Key(changes=NUMERICS, example="fp64", needs="model.fsdp_config.dtype=fp64"),
    ] = "fp32"
    """Dtype of the weights that the optimizer updates: fp32, fp64 (then everything is fp64), or bf16 (small updates are
    lost).
    """

    fsdp_size: Annotated[CountOrAll, Key(changes=LAYOUT, neutral=-1, example="8")] = -1
    """How many ranks share one copy of the weights, 1 or more (2 or more with strategy=fsdp); -1 is all of them."""

    reshard_after_forward: Annotated[bool, Key(changes=LAYOUT, neutral=True)] = True
    """Free the gathered weights of a layer after its forward: less memory, but they are gathered once more for the
    backward.
    """

    use_no_sync_for_gradient_accumulation: Annotated[bool, Key(changes=LAYOUT, neutral=False)] = False
    """Reduce gradients over the ranks after the last micro-batch only: fewer messages, but every rank holds whole
    gradients. Refused with strategy=fsdp and bf16 forwards, because FSDP1 would add up the gradients in bf16.
    """


class ModelConfig(Section):
    """The model: the weights that are trained, how they are divided, and how layers are computed."""

    partial_pretrain: Annotated[
        PathText,
        Field(description="a folder, or a hub id"),
        Key(changes=MODEL | TOKENS, per_host=True, stored_as="tokenizer", example="Qwen/Qwen2.5-0.5B-Instruct"),
    ] = "~/models/gemma-1.1-7b-it"
    """The model to start from: a Hugging Face folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct."""

    strategy: Annotated[Literal["fsdp2", "fsdp"], Key(changes=LAYOUT, neutral="fsdp2")] = "fsdp2"
    """How weights are sharded: fsdp2 (fully_shard) or fsdp (FSDP1, torch's older way). The loss, the checkpoints and
    the model are the same. Every key of fsdp_config means the same.
    """

    fsdp_config: FsdpConfig

    external_lib: Annotated[Text | None, Key(changes=MODEL, example="my_package.my_models")] = None
    """A Python module that is imported before tokenizer, data and model, for example to register a model class."""

    enable_gradient_checkpointing: Annotated[bool, Key(changes=LAYOUT, neutral=False)] = False
    """Compute activations again in the backward instead of keeping them: less memory, more time."""

    gradient_checkpointing_policy: Annotated[
        Literal["full", "selective"],
        Key(changes=LAYOUT, neutral="full", unused=unused_without("model.enable_gradient_checkpointing=true")),
    ] = "full"
    """What gradient checkpointing computes again: full (whole layers, one at a time: least memory) or selective (the
    outputs of matrix products and attention are kept, the cheap rest is computed again).
    """

    trust_remote_code: Annotated[bool, Key(changes=MODEL)] = False
    """Run Python code that comes with the model folder."""

    follow_links: Annotated[bool, Key(changes=NOTHING)] = False
    """Follow links in the model folder that lead out of it. Only for links that you made yourself."""

    attn_implementation: Annotated[
        Literal["auto", "sdpa", "varlen", "flash"], Key(changes=LAYOUT, neutral=AS_SET, example="sdpa")
    ] = "auto"
    """The kernel of attention: auto (the best that is present), sdpa (one document at a time), varlen (torch's own,
    CUDA) or flash (flash-attn, CUDA).
    """

    lora_rank: Annotated[int, Field(ge=0), Key(changes=MODEL, example="16")] = 0
    """LoRA: rank of the adapters; 0 trains all weights."""

    lora_alpha: Annotated[Count, Key(changes=MODEL, example="32", unused=UNUSED_WITHOUT_LORA)] = 16
    """LoRA: scale of the adapters, 1 or more. What an adapter adds is multiplied by lora_alpha / lora_rank."""

    target_modules: Annotated[
        Text | Strings,
        Field(description="a text, or a list of them"),
        Key(changes=MODEL, example="[q_proj,v_proj]", unused=UNUSED_WITHOUT_LORA),
    ] = "all-linear"
    """LoRA: which modules get adapters: all-linear (every linear module of the language model except the head, and
    fused expert tensors), a list of names, or a regular expression of full names.
    """

    target_parameters: Annotated[
        Strings, Key(changes=MODEL, example="[experts.down_proj]", unused=UNUSED_WITHOUT_LORA)
    ] = ()
    """LoRA: fused expert tensors (all experts of a layer in one tensor) that get adapters too, besides what
    target_modules names, by the end of their names: [experts.down_proj]. No dropout, no DoRA.
    """

    exclude_modules: Annotated[
        Text | Strings,
        Field(description="a text, or a list of them"),
        Key(changes=MODEL, example="[o_proj]", unused=UNUSED_WITHOUT_LORA),
    ] = ()
    """LoRA: which of these get no adapter: a list of ends of names, [o_proj], or a regular expression of full names.
    A fused expert tensor is excluded by its own name or by that of its module. A value that excludes nothing is
    refused.
    """

    lora_dropout: Annotated[
        float, Field(ge=0, lt=1), Key(changes=MODEL, example="0.05", unused=UNUSED_WITHOUT_LORA)
    ] = 0.0
    """LoRA: dropout of what goes into the adapters."""

    use_rslora: Annotated[bool, Key(changes=MODEL, unused=UNUSED_WITHOUT_LORA)] = False
    """LoRA: multiply by lora_alpha / sqrt(lora_rank) instead (rsLoRA)."""

    use_dora: Annotated[bool, Key(changes=MODEL, unused=UNUSED_WITHOUT_LORA)] = False
    """LoRA: DoRA, which also trains the norm of every row of an adapted weight. Linear modules only, not the head."""

    modules_to_save: Annotated[Strings, Key(changes=MODEL, example="[lm_head]", unused=UNUSED_WITHOUT_LORA)] = ()
    """LoRA: modules that are trained whole besides the adapters, by the end of their names: [lm_head], [embed_tokens],
    [norm] (that is every norm). They are saved with the adapter. Of tied embeddings, name both.
    """

    lora_adapter_path: Annotated[PathText | None, Key(changes=MODEL, per_host=True, example="earlier_run/adapter")] = (
        None
    )
    """LoRA: continue the adapter in this folder, in PEFT's format. Its rank, alpha and targets are used. null starts a
    new adapter.
    """

    use_liger: Annotated[bool, Key(changes=NUMERICS)] = False
    """Use Liger's kernels for norms, gated products and the rotary embedding (CUDA; pip install 'apollo-sft[liger]'),
    in the architectures of docs/speed.md. The loss stays our own.
    """

    compile: Annotated[bool, Key(changes=LAYOUT, neutral=AS_SET)] = False
    """Compile the layers with torch.compile, except attention: the first steps are slow. Needs g++ on a CPU, gcc and
    triton on a GPU. docs/speed.md
    """

    load_in_4bit: Annotated[bool, Key(changes=NUMERICS, needs=LORA)] = False
    """QLoRA: hold the frozen linear modules in 4 bits (CUDA; bitsandbytes, by the extra qlora). Needs LoRA and
    model.strategy=fsdp2. Has never run on a GPU. docs/lora.md
    """

    add_special_tokens: Annotated[bool, Key(changes=MODEL | TOKENS, stored_as="tokenizer")] = False
    """Add control tokens that the chat template writes but the tokenizer does not know as one token, and resize the
    embeddings. false refuses such a template, unless it is the tokenizer's own. Not with LoRA. docs/templates.md
    """
