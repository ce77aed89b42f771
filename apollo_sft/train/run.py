"""One run, from the config to the model folder: the whole program in the order in which it happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.config.compose import recorded
from apollo_sft.config.schema import SftConfig, TrainerConfig
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.place import read_place
from apollo_sft.report.log import say, setup_logging
from apollo_sft.train.announce import announce
from apollo_sft.train.assemble import assemble
from apollo_sft.train.check_model import check_model
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.claim import claim_folder
from apollo_sft.train.finish import export, hf_form, summary
from apollo_sft.train.loaders import lay_out
from apollo_sft.train.loop import run_loop
from apollo_sft.train.meter import meter_of
from apollo_sft.train.optim.build import schedule_of
from apollo_sft.train.prepare_run import Prepared, prepare
from apollo_sft.train.process import load_external_lib, make_deterministic, seed_everything
from apollo_sft.train.reporter import open_reporter
from apollo_sft.train.run_state import Run
from apollo_sft.train.sharding import needs_group
from apollo_sft.train.signals import StopFlag
from apollo_sft.train.stages import Stages
from apollo_sft.train.start_checks import check_shared, contents_of, start_of
from apollo_sft.train.strategy import strategy_of

if TYPE_CHECKING:
    from apollo_sft.train.generations import Generations

CHECKPOINT_KEPT = "its last checkpoint holds all steps"
MODEL_KEPT = "the model in the run folder is complete, and the same command uploads it"


def train(config: SftConfig, overridden: Mapping[str, Any], notes: Sequence[str], stop: StopFlag | None = None) -> None:
    """Run a whole training. Every rank calls it. `stop`: in use already; without it signals keep their usual effect.

    Raises: ApolloError with one message for the user; Stopped when a signal came where there was nothing to save.
    """
    stop = stop or StopFlag()
    stages = Stages(stop, config.trainer.default_local_dir)
    trainer = config.trainer
    seconds = trainer.collective_timeout_seconds

    stages.on_all("setting up the process", set_up_process, trainer.deterministic, config.model.external_lib)
    on_cuda = trainer.device != "cpu" and torch.cuda.is_available()

    with (
        stages.process_group(trainer.device, needs_group(config.model, on_cuda), seconds) as world,
        # Half: a rank that hangs is named before the collectives of the others reach their timeout.
        stages.heartbeat(seconds / 2) as step_ended,
        stages.run_folder(partial(claim_folder, config, overridden, notes, world, stop)) as folder,
    ):
        run_stages(config, stages, folder, stop, step_ended)


def set_up_process(deterministic: bool, external_lib: str | None) -> None:
    """Set up what must come first in a process: its place in the run, determinism, the user's module, logging."""
    place = read_place(os.environ)
    os.environ.update(place.variables)
    setup_logging(place.rank == 0)

    if deterministic:
        make_deterministic()
        say("deterministic: every operation gives the same bits each time, on the same hardware and versions")

    load_external_lib(external_lib)
    if place.starter != "torchrun" and place.size > 1:
        say(f"waiting at {place.variables['MASTER_ADDR']} for the {place.size} processes of {place.starter}")


def run_stages(
    config: SftConfig, stages: Stages, folder: RunFolder | None, stop: StopFlag, step_ended: Callable[[], object]
) -> None:
    """Check, prepare, train, write the model. `folder`: None off rank 0. `step_ended`: called after each step."""
    world = stages.world
    trainer = config.trainer

    stages.must_agree("comparing the commands of all ranks", start_of(config))
    stages.on_all("looking for the run folder", check_shared, trainer.default_local_dir, world, folder)
    stages.record(stages.on_main("checking the model", check_model, config))
    prepared = stages.once_per_host("preparing the data", prepare, config)
    stages.must_agree("comparing the data of all hosts", contents_of(prepared))

    mesh, train_loader, val_loader = stages.on_all("laying out the steps", lay_out, config, prepared, world)
    schedule = schedule_of(trainer, config.optim, train_loader.steps_per_epoch)
    stages.on_main("showing what will be trained", announce, prepared, schedule, train_loader, mesh.sp_size, folder)

    stages.on_all("seeding", seed_everything, trainer.seed, world.rank)
    base = prepared.base
    model, optimizer = stages.on_all(
        "loading the model", assemble, config, base.folder, prepared.hf_config, world, mesh, base.new_tokens
    )
    outline = strategy_of(model).outline(model).causal_lm
    checkpoints = Checkpoints(
        trainer,
        train_loader.steps_per_epoch,
        schedule.total_steps,
        facts={"processes": world.size, "data": prepared.data_key, "config": recorded(config)},
        is_main=world.is_main,
        form=hf_form(config.model, trainer, prepared, outline),
    )
    first_step = stages.on_all("reading the checkpoint", checkpoints.resume, folder, world, model, optimizer)
    reporter = open_reporter(trainer, recorded(config), folder, schedule.total_steps, first_step)

    with stages.between_steps("training"), reporter, checkpoints.waiting_on_failure():
        run = Run(
            world=world,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            train=train_loader,
            val=val_loader,
            config=config,
            checkpoints=checkpoints,
            reporter=reporter,
            step_ended=step_ended,
            meter=meter_of(trainer, config.model, outline, world, train_loader.steps_per_epoch, folder),
            generations=_generations(trainer.generate_samples, prepared, world),
        )
        run_loop(run, stop, first_step)

    written = (config.model, trainer, prepared, model, folder, world)
    stages.on_all("writing the model", export, *written, kept=CHECKPOINT_KEPT)
    say(summary(reporter, trainer, stages.seconds))
    stages.model_is_written()
    if trainer.default_hdfs_dir is not None:
        _upload(trainer, stages)


def _generations(number: int, prepared: Prepared, world: World) -> Generations | None:
    """Return the prompts of so many validation rows; None where `trainer.generate_samples` is 0."""
    if not number:
        return None
    from apollo_sft.train.generations import generations_of

    return generations_of(number, prepared, world)


def _upload(trainer: TrainerConfig, stages: Stages) -> None:
    """Upload the model. run.json notes beforehand that it is not uploaded, which holds when this process is killed."""
    from apollo_sft.train.upload import upload

    stages.record({"uploaded": False})
    stages.on_main("uploading the model", upload, trainer, kept=MODEL_KEPT)
    stages.record({"uploaded": True})
