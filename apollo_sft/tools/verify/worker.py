"""Run one process of `apollo-sft verify`: its layouts against the oracle, two steps each, all in float64.

Started as `python -m apollo_sft.tools.verify.worker FOLDER`, alone or by torchrun. The process that is alone writes the
oracle first; rank 0 of each start appends a line of JSON to FOLDER/results.jsonl for every layout that is done.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from apollo_sft.config.compose import validate
from apollo_sft.config.schema import SftConfig
from apollo_sft.config.values import with_values
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import plan
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import ApolloError
from apollo_sft.model import attention, load, lora
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh, build_mesh
from apollo_sft.report.log import setup_logging
from apollo_sft.tools.verify.layouts import BOUNDS, ORACLE_FILE, STEPS, Figures, Layout
from apollo_sft.tools.verify.oracle import StaysDouble, differences, oracle
from apollo_sft.tools.verify.small_copy import silent
from apollo_sft.train.assemble import assemble
from apollo_sft.train.base_model import as_files_hold
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.optim.build import build_optimizer
from apollo_sft.train.process import load_external_lib, seed_everything
from apollo_sft.train.sharding import needs_group
from apollo_sft.train.step import StepResult, train_step
from apollo_sft.train.strategy import strategy_of
from apollo_sft.types import AddedTokens


@dataclass(frozen=True, slots=True)
class Job:
    """The work of all processes."""

    config: SftConfig
    """The user's, changed for float64 on the CPU."""

    base: Path
    """The model folder."""

    layouts: list[Layout]

    new_tokens: AddedTokens | None = None
    """Tokens that are added to the model in `base`."""

    def write(self, folder: Path) -> None:
        """Write the job into a folder."""
        raw = {
            "config": self.config.model_dump(mode="json"),
            "base": str(self.base),
            "layouts": [asdict(layout) for layout in self.layouts],
            "new_tokens": None,
        }
        if self.new_tokens is not None:
            raw["new_tokens"] = asdict(self.new_tokens)

        (folder / "job.json").write_text(json.dumps(raw), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read the job of a folder."""
        raw = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        new_tokens = None
        if raw["new_tokens"] is not None:
            new_tokens = AddedTokens(**raw["new_tokens"])
        return cls(
            validate(raw["config"]), Path(raw["base"]), [Layout(**layout) for layout in raw["layouts"]], new_tokens
        )

    def hf_config(self) -> Any:
        """Read the config of the model, with its added tokens and without dropout."""
        found = silent(as_files_hold(self.base, self.config.model))
        if self.new_tokens is None:
            return found
        return load.with_rows(found, self.new_tokens.rows)


def write_oracle(job: Job, store: SampleStore, folder: Path) -> Figures:
    """Run two steps in plain transformers, eager attention; write losses, norms, gradients and weights."""
    hf_config = job.hf_config()
    trust = job.config.model.trust_remote_code
    attention.register(attention.sdpa_kernel)
    model = load.load_with_weights(job.base, hf_config, torch.float64, trust, job.new_tokens)
    adapter = lora.lora_config(job.config.model, str(job.base))
    if adapter is not None:
        lora.inject(model, adapter, torch.float64, job.config.model.lora_adapter_path)

    model.set_attn_implementation("eager")

    optimizer = build_optimizer(model, job.config.optim)
    spec = plan_spec(job.config.data, job.config.trainer.seed, Mesh(0, 1, 0, 1, None), hf_config)
    losses = []
    norms = []
    for step in range(STEPS):
        samples = [store[int(i)] for i in plan(store.lengths, spec, step).samples]
        with StaysDouble():  # type: ignore[no-untyped-call]
            loss, gradients = oracle(model, samples)
        trained = [p for p in model.parameters() if p.requires_grad]
        limit = job.config.optim.clip_grad or float("inf")
        losses.append(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, limit)))
        save_file({name: grad.contiguous() for name, grad in gradients.items()}, folder / f"gradients-{step}.st")
        optimizer.step()

    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, folder / "weights.st")
    (folder / ORACLE_FILE).write_text(json.dumps({"losses": losses, "norms": norms}), encoding="utf-8")
    return Figures(-1, losses[0], norms[0])


def measure(job: Job, index: int, store: SampleStore, folder: Path, world: World) -> Figures:
    """Run two steps under one layout, and compare them on rank 0. Every rank calls it."""
    config = with_values(job.config, job.layouts[index].values)
    expected = json.loads((folder / ORACLE_FILE).read_text(encoding="utf-8"))
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
    hf_config = job.hf_config()
    seed_everything(config.trainer.seed, world.rank)
    model, optimizer = assemble(config, job.base, hf_config, world, mesh, job.new_tokens)
    loader = Loader(store, plan_spec(config.data, config.trainer.seed, mesh, hf_config), mesh.dp_rank, mesh.sp_size)

    results: list[StepResult] = []
    found: list[tuple[float, float, str]] = []  # difference, its bound, what differs
    for step, bound in enumerate(BOUNDS):
        with StaysDouble():  # type: ignore[no-untyped-call]
            result = train_step(model, optimizer, loader.batch(step), world, config.optim.clip_grad)
        results.append(result)
        for name, value, wanted in (
            ("loss", result.loss, expected["losses"][step]),
            ("gradient norm", result.grad_norm, expected["norms"][step]),
        ):
            found.append((abs(value - wanted) / abs(wanted), bound, f"{name} of step {step + 1}"))
        gradients = _compared(_gathered(model, gradients=True), folder / f"gradients-{step}.st", world.is_main)
        found += [(difference, bound, f"step {step + 1}, gradient of {name}") for difference, name in gradients]

    weights = _compared(_gathered(model, gradients=False), folder / "weights.st", world.is_main)
    found += [(difference, BOUNDS[-1], f"{name} after step {STEPS}") for difference, name in weights]

    # `not <=` instead of `>`: NaN is beyond every bound. In the maximum it comes before all numbers.
    beyond = [part for part in found if not part[0] <= part[1]]
    wrong = ""
    if beyond:
        difference, _, what = max(beyond)
        wrong = f"{difference:.1e} in {what}"

    largest = max((part[0] for part in beyond or found), key=lambda difference: (difference != difference, difference))
    return Figures(index, results[0].loss, results[0].grad_norm, largest, wrong)


def _gathered(model: SftModel, gradients: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield every trained parameter, or its gradient, gathered from its shards. A collective: to be read to its end."""
    for name, parameter in strategy_of(model).as_row_sharded(model, gradients).causal_lm.named_parameters():
        if not parameter.requires_grad:
            continue
        tensor = parameter.detach()
        if gradients and parameter.grad is None:
            tensor = torch.zeros_like(tensor)
        elif gradients:
            tensor = parameter.grad
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        yield name, tensor


def _compared(found: Iterator[tuple[str, Tensor]], file: Path, is_main: bool) -> list[tuple[float, str]]:
    """Return differences and names, on rank 0; the other ranks take part in the gathering and keep nothing."""
    if not is_main:
        return [(0.0, name) for name, _ in found]
    with safe_open(file, "pt") as opened:
        expected = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return [(difference, name) for name, difference in differences(found, expected)]


def main(folder: Path) -> None:
    """Run all layouts of this number of processes."""
    setup_logging(is_main=False)
    job = Job.read(folder)
    store = SampleStore(folder / "store")
    load_external_lib(job.config.model.external_lib)
    world = launch.start("cpu", needs_group=False)
    if world.size == 1:
        _report(write_oracle(job, store, folder), folder)

    for index, layout in enumerate(job.layouts):
        if layout.processes != world.size:
            continue
        # A single process has a group only under the layouts that need one.
        if world.size == 1:
            launch.stop()
            world = launch.start("cpu", needs_group(with_values(job.config, layout.values).model, on_cuda=False))
        figures = _measure_or_fail(job, index, store, folder, world)
        if world.is_main:
            _report(figures, folder)
        gc.collect()

    launch.stop()


def _measure_or_fail(job: Job, index: int, store: SampleStore, folder: Path, world: World) -> Figures:
    """Measure a layout. A rank that fails ends all of them, which would wait for it; a single process continues."""
    try:
        return measure(job, index, store, folder, world)
    except Exception as error:
        text = traceback.format_exc(limit=-2)
        if isinstance(error, ApolloError):
            text = str(error)
        failed = Figures(index, error=text)
        if world.size == 1:
            return failed
        with suppress(FileExistsError), (folder / f"failed-{world.size}").open("x"):  # the first one reports
            _report(failed, folder)
        time.sleep(1)  # until it has reported: torchrun ends all ranks with the first that leaves
        os._exit(1)


def _report(figures: Figures, folder: Path) -> None:
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(figures)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the process group may abort the interpreter while it shuts down
