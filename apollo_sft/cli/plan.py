"""`apollo-sft plan`: the memory, the work and the time of a training, before there is a GPU or a weight."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apollo_sft.cli.arguments import Parser
from apollo_sft.config.compose import Composed, compose, to_yaml
from apollo_sft.config.schema import DataConfig, SftConfig, TrainerConfig
from apollo_sft.errors import ConfigError

if TYPE_CHECKING:
    from apollo_sft.tools.plan.planner import Machine, Plan

HELP = """apollo-sft plan [options] key=value …

Takes the keys of a training and shows what a rank will hold in memory, the largest micro-batch that fits, a layout that
fits, the number of steps, FLOPs and the time. config.json of model.partial_pretrain is enough: no weights, GPU or data.

  --gpus N             GPUs, of all nodes together [what the keys say, or 1]
  --nodes N            on so many nodes [trainer.nnodes]
  --gpu-memory 80GiB   of one GPU; nothing is held against a limit without it
  --reserve 8GiB       of it, for what is not counted: CUDA, its allocator, NCCL [a tenth]
  --peak-tflops X      of one GPU, in the dtype of the forwards [trainer.peak_tflops, or 989: H100, dense bf16]
  --mfu X              share of the peak that the training reaches [0.4]
  --json               the figures as one JSON object
  --help               this text

Exit codes: 0 it fits, or no memory was given; 1 it does not fit; 2 refused."""
UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
DOES_NOT_FIT = 1
PEAK_TFLOPS = 989.0
"""H100 SXM, dense bf16. Source: NVIDIA's data sheet, half of the figure with sparsity."""


def main(arguments: list[str]) -> int:
    """Plan a training. Return the exit code. Raises: ApolloError for what a training would refuse as well."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0

    options, overrides = _parse(arguments)
    composed = _composed(overrides)
    if composed is None:
        return 0

    from apollo_sft.tools.plan.planner import Planner  # torch, after everything that can be refused without it

    config = composed.config
    least = max(config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size, 1)
    machine = _machine(options, config.trainer, least)
    plan = Planner(config, machine).plan()
    if options.json:
        print(json.dumps(_figures(machine, plan), indent=2))
    else:
        print("\n".join(text(config, machine, plan)))
    if not plan.fits:
        return DOES_NOT_FIT
    return 0


def _composed(overrides: list[str]) -> Composed | None:
    """Compose the config; print it and return None for `--cfg`. Files of data need not exist. Raises: ConfigError."""
    if "--cfg" in overrides:
        at = overrides.index("--cfg")
        print(to_yaml(compose([*overrides[:at], *overrides[at + 2 :]]).config).rstrip())
        return None
    return compose(overrides)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our own options, which may be anywhere in the line, and the rest of it. Raises: ConfigError."""
    parser = Parser(prog="apollo-sft plan", add_help=False, allow_abbrev=False)
    for name in ("--gpus", "--nodes"):
        parser.add_argument(name, type=_count)

    for name in ("--gpu-memory", "--reserve"):
        parser.add_argument(name, type=_bytes)

    parser.add_argument("--peak-tflops", type=_positive)
    parser.add_argument("--mfu", type=_positive, default=0.4)
    parser.add_argument("--json", action="store_true")

    # Keys of a training are not known to the parser: they are the rest. A wrong option would be among them.
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("-") and "=" not in argument and argument != "--cfg":
            close = difflib.get_close_matches(
                argument, ["--gpus", "--nodes", "--gpu-memory", "--reserve", "--mfu"], n=1
            )
            fix = "apollo-sft plan --help"
            if close:
                fix = f"did you mean {close[0]}?"
            raise ConfigError(f"apollo-sft plan has no option {argument}", fix=fix)

    if options.mfu > 1:
        raise ConfigError("--mfu is a share", found=options.mfu, expected="above 0, at most 1")
    return options, rest


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, not {text!r}")
    return value


def _bytes(text: str) -> int:
    """Read a size with its unit, such as 80GiB."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"bytes such as 80GiB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _machine(options: argparse.Namespace, trainer: TrainerConfig, least: int) -> Machine:
    """Return the machine to plan for. `least`: ranks that the layout needs, which are planned where no number is given.

    Raises: ConfigError when the GPUs cannot be spread over the nodes.
    """
    from apollo_sft.tools.plan.planner import Machine

    # Options come before keys. Without either, the smallest machine that the layout allows is planned.
    nodes = options.nodes or trainer.nnodes
    gpus = max(nodes, least)
    if options.gpus:
        gpus = options.gpus
    elif trainer.n_gpus_per_node:
        gpus = nodes * trainer.n_gpus_per_node
    if gpus % nodes:
        raise ConfigError("--gpus are those of all nodes together", found=f"{gpus} GPUs, {nodes} nodes")

    on_cuda = trainer.device != "cpu"
    reserve = (options.gpu_memory or 0) // 10
    if options.reserve is not None:
        reserve = options.reserve

    peak = (options.peak_tflops or trainer.peak_tflops or PEAK_TFLOPS) * 1e12
    return Machine(gpus, gpus // nodes, on_cuda, options.gpu_memory, reserve, peak, options.mfu)


def text(config: SftConfig, machine: Machine, plan: Plan) -> list[str]:
    """Return the lines that are printed."""
    sp = config.ulysses_sequence_parallel_size
    layout = f"dp {machine.gpus // sp} x sp {sp}"
    return [
        *_head(config.data.max_length, f"{layout}, {config.model.strategy}", machine, plan),
        "",
        *_memory(machine, plan),
        "",
        *_fits(machine, plan),
        *_work(config.data, machine, plan),
    ]


def _head(max_length: int, layout: str, machine: Machine, plan: Plan) -> list[str]:
    model = plan.model
    parameters = f"{model.parameters:,} parameters"
    if model.trained != model.parameters:
        parameters += f", {model.trained:,} trained"
    if model.active < 0.8 * model.parameters:  # mostly models with experts
        parameters += f", {model.active:,} used by a token"

    kinds = {"one": "CPU process", "several": "CPU processes"}
    if machine.on_cuda:
        kinds = {"one": "GPU", "several": "GPUs"}

    ranks = f"{machine.gpus} {kinds['several']}, {machine.per_node} a node"
    if machine.gpus == 1:
        ranks = f"1 {kinds['one']}, {machine.per_node} a node"
    return [
        f"model      {model.name}, {model.layers} layers, {parameters}",
        f"ranks      {ranks}: {layout}",
        f"forwards   {plan.size_key}={plan.size}, rows of data.max_length={max_length} tokens, all targets",
    ]


def _memory(machine: Machine, plan: Plan) -> list[str]:
    lines = [f"memory of one rank when it holds most: in the {plan.memory.when}"]
    lines += [f"  {name:<28}{gib(size)}" for name, size in plan.memory.parts.items() if size]
    lines.append(f"  {'total':<28}{gib(plan.memory.total)}")

    if machine.memory is not None:
        lines.append(
            f"  {'reserve':<28}{gib(machine.reserve)}   computed: CUDA, its allocator and NCCL are not run here"
        )
        verdict = "fits"
        if not plan.fits:
            verdict = "DOES NOT FIT"
        lines.append(f"  {'of':<28}{gib(machine.memory)}   {verdict}")

    host = {
        **plan.memory.host,
        "copy for a checkpoint": plan.checkpoint_copy,
        "rank 0, while weights are read": plan.reading,
    }
    lines.append("on the CPU")
    lines += [f"  {name:<28}{gib(size)}" for name, size in host.items() if size]
    return lines


def _fits(machine: Machine, plan: Plan) -> list[str]:
    if machine.memory is None:
        return []

    lines = [f"largest    no {plan.size_key} fits"]
    if plan.largest:
        lines = [f"largest    {plan.size_key}={plan.largest}"]

    advice = plan.advice
    if advice is not None and advice.keys is not None and advice.memory is not None:
        keys = " ".join(f"{key}={str(value).lower()}" for key, value in advice.keys.items())
        lines.append(f"advice     {keys or 'keep these keys'}: {gib(advice.memory.total).strip()}")
    elif advice is not None:
        lines.append(f"advice     none of {advice.tried} layouts fits: more GPUs, a shorter data.max_length, or LoRA")

    return lines


def _work(data: DataConfig, machine: Machine, plan: Plan) -> list[str]:
    work = plan.work
    steps = "one step"
    if work.steps is not None:
        steps = f"{work.steps:,} steps of {data.train_batch_size} samples"

    rows = ""
    where = "the number of rows is not known"
    if work.samples is not None:
        rows = f"{work.samples:,} rows, "
        where = "from the files' footers"

    rate = f"{machine.gpus} x {machine.peak / 1e12:g} TFLOPs at MFU {machine.mfu:g}"
    return [
        f"work       {steps}: {rows}at most {work.tokens:,} tokens ({where})",
        f"           {work.flops:.3g} FLOPs, {duration(work.seconds)} on {rate}",
    ]


def gib(num_bytes: float) -> str:
    """Return bytes in GiB, in a column."""
    return f"{num_bytes / 2**30:10.2f} GiB"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _figures(machine: Machine, plan: Plan) -> dict[str, Any]:
    """Return the figures of `--json`."""
    given = asdict(machine)
    return {"memory_limit": given.pop("memory"), **given, **asdict(plan)}
