"""verl's SFT trainer on the same rows, in turns; runs in verl's own environment. Arguments: one JSON object.

verl 0.9.1 trains on CUDA and NPU only. What is added here, from outside, to a package that is not changed: a platform
named `cpu` whose device functions do nothing or are torch.cpu's, and the registration of verl's own FSDP engine for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"VERL_PLATFORM": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WANDB_MODE": "offline"}

import torch
from turns import Turns
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry

DEVICE = SimpleNamespace(
    is_available=lambda: True,
    is_initialized=lambda: True,
    current_device=lambda: "cpu",
    device_count=lambda: 1,
    set_device=lambda *_: None,
    synchronize=lambda *_: None,
    empty_cache=lambda: None,
    ipc_collect=lambda: None,
    memory_allocated=lambda *_: 0,
    memory_reserved=lambda *_: 0,
    max_memory_allocated=lambda *_: 0,
    max_memory_reserved=lambda *_: 0,
    reset_peak_memory_stats=lambda *_: None,
    mem_get_info=lambda *_: (0, 0),
    get_device_name=lambda *_: "CPU",
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
)


@PlatformRegistry.register(platform="cpu")
class Cpu(PlatformCUDA):
    device_name = "cpu"  # type: ignore[assignment]
    vendor_name = "cpu"  # type: ignore[assignment]
    device_module = DEVICE  # type: ignore[assignment]

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def set_device(self, device_index: int) -> None:
        del device_index

    def synchronize(self, device_index: int | None = None) -> None:
        del device_index

    def empty_cache(self) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"


def config_of(options: dict[str, Any], out: Path) -> Any:
    import verl.trainer
    from hydra import compose, initialize_config_dir

    dtype = "bfloat16" if options["dtype"] == "bf16" else "float32"
    keys = [
        f"model.path={options['model']}",
        "model.enable_gradient_checkpointing=False",
        "model.use_remove_padding=False",
        "+model.override_config.attn_implementation=sdpa",
        "engine.strategy=fsdp2",
        f"engine.dtype={dtype}",
        f"+engine.mixed_precision={{param_dtype: {options['dtype']}, reduce_dtype: fp32, buffer_dtype: fp32}}",
        "engine.use_torch_compile=False",
        f"optim.lr={options['rate']}",
        "optim.weight_decay=0.0",
        "optim.betas=[0.9,0.95]",
        f"data.train_files={options['data']}",
        f"data.train_batch_size={options['batch']}",
        f"data.micro_batch_size_per_gpu={options['batch']}",
        "data.use_dynamic_bsz=False",
        "data.num_workers=0",
        "checkpoint.save_contents=[hf_model]",
        f"trainer.default_local_dir={out / 'run'}",
        "trainer.device=cpu",
        "trainer.logger=[console]",
        "trainer.total_epochs=1",
        "trainer.resume_mode=disable",
        f"trainer.total_training_steps={options['steps']}",
    ]
    folder = Path(verl.trainer.__file__).parent / "config"
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        return compose("sft_trainer_engine", keys)


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    turns, out = Turns(options["every"]), Path(options["out"])
    with contextlib.redirect_stdout(sys.stderr):
        import torch.distributed as dist
        from verl.trainer import sft_trainer
        from verl.workers.engine.base import EngineRegistry
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
        from verl.workers.utils import losses

        EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])(
            FSDPEngineWithLMHead
        )
        loss_of, wide = losses.sft_loss, []

        def noted_loss(model_output: Any, **more: Any) -> Any:
            """verl's own, and the same again from its log-probabilities in float64."""
            with torch.no_grad():
                doubled = {"log_probs": model_output["log_probs"].double()}
                wide.append(float(loss_of(model_output=doubled, **more)[0]))
            return loss_of(model_output=model_output, **more)

        losses.sft_loss = noted_loss
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        trainer = sft_trainer.SFTTrainer(config_of(options, out))
        began = time.process_time()
        for row in range(len(trainer.train_dataset)):
            trainer.train_dataset[row]
        turns.facts["preparation_rows_per_second"] = options["rows"] / (time.process_time() - began)
        track, save, saving = sft_trainer.Tracking.log, trainer.ckpt_handler.save_checkpoint, []

        def timed_log(self: Any, data: dict[str, Any], step: int, **more: Any) -> None:
            track(self, data=data, step=step, **more)
            turns.step(wide.pop())

        def timed_save(*arguments: Any, **more: Any) -> None:
            began = time.perf_counter()
            save(*arguments, **more)
            saving.append(time.perf_counter() - began)

        sft_trainer.Tracking.log, trainer.ckpt_handler.save_checkpoint = timed_log, timed_save
        turns.begin()
        trainer.fit()
    turns.end(next((out / "run").rglob("*.safetensors")).parent, saving[-1])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
