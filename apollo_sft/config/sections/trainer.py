"""The section `trainer`: the run, its folder, what it shows and saves, and the machines it runs on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from apollo_sft.config.keys import AS_SET, LAYOUT, LENGTH, MODEL, NOTHING, ORDER, Key, Section, Unused
from apollo_sft.config.schema_types import (
    SAVE_FREQUENCIES,
    Count,
    CountOrAll,
    PathText,
    Strings,
    Text,
    as_tuple,
    first_and_last,
    save_frequency,
    short_dtype,
)

CHECKPOINT = "other_run/checkpoints/step_000200"


class CheckpointConfig(Section):
    """What a checkpoint holds and how it is written."""

    save_contents: Annotated[
        tuple[Literal["model", "optimizer", "extra", "hf_model"], ...],
        Field(min_length=1),
        BeforeValidator(as_tuple),
        Key(changes=NOTHING, example="[model,optimizer,extra]"),
    ] = ("model", "optimizer", "extra", "hf_model")
    """The contents of a checkpoint. Three of them are needed to resume a run: model (trained weights), optimizer, and
    extra (random states and the step). hf_model is a Hugging Face folder of the same step, in hf/ (with LoRA: the
    adapter).
    """

    hf_model_at: Annotated[
        Literal["every", "best_and_last"],
        Key(
            changes=NOTHING,
            unused=Unused(
                "without hf_model in trainer.checkpoint.save_contents",
                lambda config: "hf_model" not in config.trainer.checkpoint.save_contents,
            ),
        ),
    ] = "every"
    """Which checkpoints have hf/: every one, or best_and_last."""

    async_save: Annotated[bool, Key(changes=NOTHING)] = True
    """Write checkpoints while training continues, from a copy in CPU memory. false lets training wait for the disk."""


class TrainerConfig(Section):
    """The run: its folder and length, what it shows and saves, and the machines it runs on."""

    default_local_dir: Annotated[PathText, Key(changes=NOTHING, per_host=True, example="runs/first")] = "/tmp/sft_model"
    """The run's folder: metrics, config, checkpoints, and at the end the model. It is new or empty, or holds a run to
    resume (resume_mode).
    """

    default_hdfs_dir: Annotated[PathText | None, Key(changes=NOTHING, example="s3://bucket/runs/first")] = None
    """Where the model is copied when the run is finished: a folder, or a URL of a scheme that fsspec knows (s3, gs,
    hdfs, hf). The run starts only if something can be written there. null copies it nowhere. docs/checkpoints.md
    """

    project_name: Annotated[Text, Key(changes=NOTHING, example="my-project")] = "gsm8k-sft"
    """Name of the project in the loggers."""

    experiment_name: Annotated[Text, Key(changes=NOTHING, example="lr-2e-5")] = "test"
    """Name of this run in the loggers."""

    total_epochs: Annotated[Count, Key(changes=LENGTH | MODEL, example="2")] = 4  # MODEL: the schedule follows
    """Passes over the training data, 1 or more."""

    total_training_steps: Annotated[Count | None, Key(changes=LENGTH | MODEL, example="500")] = None
    """Train this many steps instead, more or fewer than total_epochs would give. The learning rate schedule follows.
    null: total_epochs decides.
    """

    logger: Annotated[Strings, Key(changes=NOTHING, example="[console,tensorboard]")] = ("console",)
    """Any of console, tensorboard, wandb, mlflow, swanlab, trackio, file; one name or a list: [console,wandb].
    metrics.jsonl is always written. Where each one writes: docs/loggers.md
    """

    log_freq: Annotated[Count, Key(changes=NOTHING, example="10")] = 1
    """Write to the loggers every this many steps. metrics.jsonl holds every step."""

    seed: Annotated[int, Field(ge=0, lt=2**63), Key(changes=ORDER | MODEL, example="7")] = 1
    """The seed of everything random, 0 or more: order of the data, initial adapters, dropout."""

    save_freq: Annotated[
        int | str,
        BeforeValidator(save_frequency),
        Field(description=SAVE_FREQUENCIES),
        Key(changes=NOTHING, example="30min"),
    ] = -1
    """When a checkpoint is saved: -1 or epoch at the ends of epochs, every this many steps (200), or every this many
    minutes (30min). One is always saved after the last step.
    """

    test_freq: Annotated[CountOrAll, Key(changes=NOTHING, example="100")] = -1
    """When the model is validated: -1 at the ends of epochs and at the end, or every this many steps and at the end."""

    val_before_train: Annotated[bool, Key(changes=NOTHING)] = False
    """Validate once before the first step."""

    resume_mode: Annotated[
        Literal["auto", "disable", "resume_path"],
        Key(changes=NOTHING, example="resume_path", needs=f"trainer.resume_from_path={CHECKPOINT}"),
    ] = "auto"
    """What happens to an earlier run in default_local_dir: auto resumes it from its newest checkpoint, disable moves it
    to previous-<time>/. resume_path begins a new run at the checkpoint resume_from_path, of any run.
    """

    # The run folder refuses another checkpoint by itself once a run has begun, so this key need not be compared.
    resume_from_path: Annotated[
        PathText | None, Key(changes=NOTHING, example=CHECKPOINT, needs="trainer.resume_mode=resume_path")
    ] = None
    """The checkpoint to begin at with resume_mode=resume_path, such as OTHER_RUN/checkpoints/step_000200; else null."""

    resume_with_changes: Annotated[bool, Key(changes=NOTHING)] = False
    """Resume a run although keys differ that change the samples of a step or the model. They are listed either way."""

    max_ckpt_to_keep: Annotated[Count, Key(changes=NOTHING, example="5")] = 2
    """How many checkpoints are kept, 1 or more. Older ones are deleted once a newer one is on the disk."""

    save_best_on: Annotated[Literal["val/loss"] | None, Key(changes=NOTHING, example="val/loss")] = None
    """val/loss: save a checkpoint at every validation whose loss is the lowest so far, keep it, and let
    checkpoints/best lead to it. null does not.
    """

    early_stop_patience: Annotated[Count | None, Key(changes=LENGTH, example="3")] = None
    """End the run after this many validations in a row without a new lowest val/loss; null never does."""

    checkpoint: CheckpointConfig

    export: Annotated[
        Literal["merged", "adapter", "both"], Key(changes=NOTHING, example="both", needs="model.lora_rank=16")
    ] = "merged"
    """What the run's folder holds at the end: merged (a plain Hugging Face model; after LoRA with the adapter beside
    it, in adapter/), adapter (only the adapter), both (the same as merged).
    """

    export_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], BeforeValidator(short_dtype), Key(changes=NOTHING)
    ] = "auto"
    """Dtype of the exported weights: auto (that of the base model's own files), fp32, bf16, fp16."""

    generate_samples: Annotated[
        int,
        Field(ge=0),
        Key(
            changes=NOTHING,
            example="4",
            unused=Unused("without validation data", lambda config: not config.data.val_files),
        ),
    ] = 0
    """At every validation, let the model answer the prompts of this many validation rows: greedy, at most 128 tokens
    each. The answers go to samples.jsonl and to the loggers that take text. 0 generates none. docs/report.md
    """

    nnodes: Annotated[Count, Key(changes=LAYOUT, neutral=AS_SET, example="2")] = 1
    """Number of hosts. What was started decides (torchrun, srun). A number that you set is checked against it.
    docs/clusters.md
    """

    n_gpus_per_node: Annotated[Count | None, Key(changes=LAYOUT, neutral=AS_SET, example="8")] = None
    """Processes on each host; apollo-sft train starts this many. null: one for each GPU, or what torchrun gives."""

    collective_timeout_seconds: Annotated[Count, Key(changes=NOTHING, example="3600")] = 1800
    """With several processes: a rank that waits longer than this for another one ends the run with an error. A rank
    that sends no heartbeat for half of this time, at most 5 minutes, is named. Preparing the data may take any time.
    docs/clusters.md
    """

    peak_tflops: Annotated[Annotated[float, Field(gt=0)] | None, Key(changes=NOTHING, example="989")] = None
    """What one GPU could do at most, in 1e12 operations a second, above 0. perf/mfu is the share of it that the model
    used. null takes the figure of a known NVIDIA GPU with bf16 forwards; for any other, perf/mfu is left out.
    """

    profile_steps: Annotated[
        tuple[Count, ...],
        AfterValidator(first_and_last),
        BeforeValidator(as_tuple),
        Key(changes=NOTHING, example="[10,12]", written="null"),
    ] = ()
    """Record these steps with torch's profiler on rank 0: [first,last], counted from 1. The trace is in profile/ of the
    run folder, for ui.perfetto.dev. Recorded steps are slower. null records none.
    """

    deterministic: Annotated[bool, Key(changes=LAYOUT, neutral=AS_SET)] = False
    """Use only operations that give the same bits each time, on the same hardware and versions. A run is slower. If the
    model has an operation without such a form, the run ends with an error that names it.
    """

    device: Annotated[Literal["auto", "cuda", "cpu"], Key(changes=LAYOUT, neutral=AS_SET, example="cpu")] = "auto"
    """Where to train: auto (CUDA when there is one), cuda, cpu."""
