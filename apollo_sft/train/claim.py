"""Claim the run folder, on rank 0: nothing on a disk is changed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.config.compose import recorded, to_yaml
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import AlreadyDone
from apollo_sft.parallel.launch import World
from apollo_sft.report.log import say
from apollo_sft.report.sinks import check_backends
from apollo_sft.train.announce import config_text
from apollo_sft.train.signals import StopFlag
from apollo_sft.train.start_checks import check_world


def claim_folder(
    config: SftConfig, overridden: Mapping[str, Any], notes: Sequence[str], world: World, stop: StopFlag
) -> RunFolder:
    """Check what can be checked before anything is changed, claim the run folder, and show the configuration.

    `overridden`: keys that were set. `notes`: lines from composing the config.
    Raises: ConfigError, TopologyError; AlreadyDone when the folder holds the finished run, whose upload is then done.
    """
    trainer = config.trainer
    check_backends(trainer.logger)
    if trainer.default_hdfs_dir is not None:
        from apollo_sft.train.upload import check_destination

        check_destination(trainer)
    check_world(config, world, overridden)

    try:
        folder = RunFolder.claim(
            trainer.default_local_dir,
            trainer.resume_mode,
            recorded(config),
            trainer.resume_from_path,
            trainer.resume_with_changes,
            say,
        )
    except AlreadyDone:
        if trainer.default_hdfs_dir is not None:
            from apollo_sft.train.upload import upload

            upload(trainer)
        raise

    # From here on run.json must record how the run ended. Only `Stages` can write that, and it has no folder yet: a
    # signal has to wait.
    stop.between_steps("claiming the run folder")
    with folder.released_on_failure():
        started = {"overridden": dict(overridden), "processes": world.size, "hosts": world.num_hosts}
        folder.write_run("running", **started, device=world.device.type)
        folder.write_config(to_yaml(config))

    say(config_text(config, overridden))
    for note in [*notes, *folder.notes]:
        say(note)
    return folder
