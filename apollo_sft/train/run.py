"""One run, from the config to the model folder: the whole program in the order in which it happens."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apollo_sft.checkpoint.agree import explained
from apollo_sft.checkpoint.run_folder.folder import RunFolder, Status, status_of
from apollo_sft.config.compose import recorded, to_yaml
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.plan import steps_per_epoch
from apollo_sft.errors import AlreadyDone, ApolloError, Stopped, TrainingError
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.parallel.place import read_place
from apollo_sft.parallel.pulse import Pulse
from apollo_sft.report.log import say, setup_logging, warn
from apollo_sft.report.sinks import RunInfo, check_backends
from apollo_sft.train.assemble import assemble, needs_group
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.finish import export, hf_form, summary
from apollo_sft.train.generations import generations_of
from apollo_sft.train.loaders import build_loaders
from apollo_sft.train.loop import run_loop
from apollo_sft.train.meter import meter_of
from apollo_sft.train.optim.build import Schedule
from apollo_sft.train.prepare_run import (
    check_model,
    load_external_lib,
    make_deterministic,
    prepare,
    seed_everything,
)
from apollo_sft.train.reporter import Reporter
from apollo_sft.train.run_state import Run
from apollo_sft.train.signals import BEFORE_TRAINING, StopFlag
from apollo_sft.train.start_checks import (
    announce,
    check_alike,
    check_shared,
    check_world,
    config_text,
    contents_of,
    schedule_of,
    start_of,
)
from apollo_sft.train.strategy import strategy_of
from apollo_sft.train.upload import check_destination, upload
from apollo_sft.types import ignore


def train(config: SftConfig, overridden: Mapping[str, Any], notes: Sequence[str], stop: StopFlag | None = None) -> None:
    """Run a whole training. Every rank calls it. Without `stop`, which is in use then, signals do what they always do.

    Raises: ApolloError with one message for the user; Stopped when a signal came where there was nothing to save.
    """
    place = read_place(os.environ)
    os.environ.update(place.variables)
    if config.trainer.deterministic:
        make_deterministic()
    load_external_lib(config.model.external_lib)
    on_cuda = config.trainer.device != "cpu" and torch.cuda.is_available()
    setup_logging(place.rank == 0)
    if config.trainer.deterministic:
        say("deterministic: every operation gives the same bits each time, on the same hardware and versions")
    if place.starter != "torchrun" and place.size > 1:
        say(f"waiting at {place.variables['MASTER_ADDR']} for the {place.size} processes of {place.starter}")
    stop, seconds = stop or StopFlag(), config.trainer.collective_timeout_seconds
    world = launch.start(config.trainer.device, needs_group(config, on_cuda), seconds)
    # Half: when a rank stands still it is named before the others give up waiting for it.
    pulse = Pulse(world, seconds / 2, lambda found: stop.end_now("failed", TrainingError.exit_code, found), warn)
    try:
        _in_folder(config, overridden, notes, world, stop, pulse)
    except BaseException:
        pulse.end(failed=True)
        if world.size > 1:
            raise  # the group stays: the others must not lose their connections before this rank has said why
        launch.stop()
        raise
    pulse.end()
    gc.collect()  # frees what holds sub-groups before the group itself is destroyed
    launch.stop()


def _in_folder(
    config: SftConfig,
    overridden: Mapping[str, Any],
    notes: Sequence[str],
    world: World,
    stop: StopFlag,
    pulse: Pulse,
) -> None:
    """Claim the run folder, run, and write down in run.json how it ended."""
    folder = launch.on_main(world, "claim", lambda: _claim(config, overridden, notes, world, stop))
    status: Status = "failed"
    if folder is not None:
        stop.last_words = folder.write_run
    try:
        stop.at_once(BEFORE_TRAINING)
        check_alike("start", start_of(config), world)
        check_shared(config.trainer.default_local_dir, world, folder)
        _run(config, world, folder, stop, pulse)
        stop.never()
        status = "finished"
        if config.trainer.default_hdfs_dir is not None:
            launch.on_main(world, "upload", lambda: _upload(config, folder, stop))
    except (ApolloError, Stopped) as error:
        status = status if status == "finished" else status_of(error.exit_code)
        raise
    except OSError as error:
        raise _about_the_disk(error, config) from error
    finally:
        stop.never()
        if folder is not None:
            _leave(folder, status)


def _upload(config: SftConfig, folder: RunFolder | None, stop: StopFlag) -> None:
    """The run is finished, whatever becomes of this. run.json says whether it is still to be done."""
    assert folder is not None
    stop.last_words = ignore
    folder.write_run("finished", uploaded=False)
    stop.at_once("while the model was uploaded: it lies whole here, and the same command again uploads alone")
    upload(config.trainer)
    stop.never()
    folder.write_run("finished", uploaded=True)


def _about_the_disk(error: OSError, config: SftConfig) -> Exception:
    where = error.filename if isinstance(error.filename, str) else config.trainer.default_local_dir
    return explained(error, Path(where), None, "this run") or error


def _leave(folder: RunFolder, status: Status) -> None:
    """A disk that is full or gone must not hide why the run ended."""
    try:
        folder.write_run(status)
    except OSError as error:
        warn(f"{folder.run_json} does not say that the run has {status}: {error}")
    finally:
        folder.release()


def _claim(
    config: SftConfig, overridden: Mapping[str, Any], notes: Sequence[str], world: World, stop: StopFlag
) -> RunFolder:
    check_backends(config.trainer.logger)
    check_destination(config.trainer)
    check_world(config, world, overridden)
    trainer = config.trainer
    facts = {"overridden": dict(overridden), "processes": world.size, "hosts": world.num_hosts}
    try:
        folder = RunFolder.claim(
            trainer.default_local_dir,
            trainer.resume_mode,
            recorded(config),
            trainer.resume_from_path,
            trainer.resume_with_changes,
            say,
        )
        stop.between_steps()  # from here on run.json has to say how the run ended
        with folder.released_on_failure():
            folder.write_run("running", **facts, device=world.device.type)
            folder.write_config(to_yaml(config))
    except AlreadyDone:
        upload(config.trainer)
        raise
    except OSError as error:
        raise _about_the_disk(error, config) from error
    say(config_text(config, overridden))
    for note in [*notes, *folder.notes]:
        say(note)
    return folder


def _run(config: SftConfig, world: World, folder: RunFolder | None, stop: StopFlag, pulse: Pulse) -> None:
    """Prepare, assemble, train, export. `folder` is None off rank 0."""
    found = launch.on_main(world, "model", lambda: check_model(config))
    if folder is not None:
        folder.write_run("running", **(found or {}))
    prepared = launch.once_per_host(world, "prepare", lambda: prepare(config))
    check_alike("contents", contents_of(prepared), world)
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
    train_loader, val_loader = build_loaders(config, prepared, mesh, pinned=world.device.type == "cuda")
    in_epoch = steps_per_epoch(len(prepared.train), train_loader.spec)
    schedule = schedule_of(config, in_epoch)
    if folder is not None:
        announce(config, prepared, schedule, train_loader, folder)
    seed_everything(config.trainer.seed, world.rank)
    base = prepared.base
    model, optimizer = assemble(config, base.folder, prepared.hf_config, world, mesh, base.growth)
    facts = {"processes": world.size, "data": prepared.data_key, "config": recorded(config)}
    outline = strategy_of(model).outline(model).causal_lm
    form = hf_form(config, prepared, outline)
    checkpoints = Checkpoints(config.trainer, in_epoch, schedule.total_steps, facts, world.is_main, form)
    newest = launch.from_main(folder.resume_from if folder is not None else None, world)
    first_step = checkpoints.begin(newest, model, optimizer)
    reporter = _reporter(config, folder, schedule, first_step)
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
        pulse=pulse,
        meter=meter_of(config, outline, world, in_epoch, folder),
        generations=generations_of(config, prepared, world),
    )
    stop.between_steps()
    try:
        run_loop(run, stop, first_step)
    except TrainingError:  # of all ranks alike: the save that is being written is a good one
        checkpoints.settle()
        raise
    finally:
        reporter.close()
    stop.at_once("while the model was being written: its last checkpoint holds all steps")
    export(config, prepared, model, folder, world)
    say(summary(reporter, config))


def _reporter(config: SftConfig, folder: RunFolder | None, schedule: Schedule, first_step: int) -> Reporter:
    trainer = config.trainer
    info = None
    if folder is not None:
        settings = recorded(config)
        info = RunInfo(folder.root, trainer.project_name, trainer.experiment_name, settings, first_step)
    return Reporter(trainer, info, schedule.total_steps)
