"""`apollo-sft export`: write a model folder from a checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from apollo_sft.cli.arguments import Parser

HELP = """apollo-sft export CHECKPOINT|RUN_FOLDER [OUT] [options]

Writes the model of a checkpoint as a folder that transformers, vLLM, verl and TRL open by its path: names and shapes of
the base model's own files, the chat template and the stop tokens that were trained. A LoRA adapter is merged. The end
of a run does the same with its last step. Needs the base model where it was, but no GPU.

  OUT            a new folder, or one of an earlier export [RUN_FOLDER-step_N, beside the run folder]
  --step WHICH   of a run folder: latest, best, or the number of a step [latest]
  --dtype DTYPE  of the files: auto (as the base's), bf16, fp16 or fp32 [as the run was configured]
  --help         this text

Exit codes: 0 done, 1 failed, 2 refused. Files that an export did not write are never replaced."""


def main(arguments: list[str]) -> int:
    """Export a checkpoint. Return the exit code. Raises: ApolloError for what cannot be exported."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    options = _parse(arguments)
    from apollo_sft.checkpoint.run_folder.lookup import find_checkpoint, find_run
    from apollo_sft.tools.export import export_checkpoint

    checkpoint = find_checkpoint(options.source, options.step)
    run = find_run(checkpoint)
    out = options.out
    # Beside the run folder, not inside: the folder of a run belongs to the run alone.
    if out is None and run is not None:
        out = run.with_name(f"{run.name}-{checkpoint.name}")
    elif out is None:
        out = checkpoint.with_name(f"{checkpoint.name}-model")

    for note in export_checkpoint(checkpoint, out, options.dtype):
        print(note)

    print(f"{out}: the model of {checkpoint}")
    print(f"apollo-sft handoff {out} checks what RL will read of it.")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="apollo-sft export", add_help=False, allow_abbrev=False)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--step", default="latest")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"))
    return parser.parse_args(arguments)
