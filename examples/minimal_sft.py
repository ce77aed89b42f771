"""Fine-tune a model in one process, as short as it can be over the modules of this project.

It trains the same tokens, with the same loss and the same result, as `apollo-sft train` with these keys. What is
missing is what a long run needs: checkpoints, validation, many processes, signals, loggers.

    python -m examples.minimal_sft MODEL_FOLDER train.parquet OUT_FOLDER [key=value …]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from apollo_sft.checkpoint.model_folder.write import ExportOptions, save_model
from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import PlanSpec, steps_per_epoch
from apollo_sft.data.render.template import is_own
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.model import attention, load
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.train.base_model import load_tokenizer, open_base
from apollo_sft.train.optim.build import Schedule, build_optimizer, warmup_steps
from apollo_sft.train.step import train_step


def main(model_folder: str, train_file: str, out: str, *more: str) -> list[float]:
    """Train, and write a model folder into `out`. Returns the loss of every step: mean over its target tokens."""
    config = compose(
        [f"model.partial_pretrain={model_folder}", f"data.train_files={train_file}", "data.val_files=null", *more]
    ).config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(rank=0, size=1, local_rank=0, device=device)

    # 1. The base as it lies on disk, its tokenizer, and the chat template.
    base, hf_config = open_base(config)
    tokenizer = load_tokenizer(base.folder, config.model.trust_remote_code)
    template = fit_template(tokenizer, config.data, add=False)

    # 2. Rows -> conversations -> tokens with targets, made once and kept on disk.
    paths = config.data.train_files
    request = StoreRequest("train", paths, config.data.train_max_samples, tokenizer, template, config.data)
    store = prepare_store(request, print)

    # 3. Which samples each step holds. A micro-batch is one row of packed documents, without padding.
    spec = PlanSpec(
        batch_size=config.data.train_batch_size,
        micro_batch_size=config.data.micro_batch_size_per_gpu,
        dp_size=1,
        seed=config.trainer.seed,
    )
    loader = Loader(store, spec, dp_rank=0)
    total_steps = config.trainer.total_epochs * steps_per_epoch(len(store), spec)

    # 4. The model in float32 with our attention, which keeps packed documents apart: that is proven before it is used.
    attention.register(attention.sdpa_kernel)
    model = SftModel(load.load_with_weights(base.folder, hf_config, torch.float32, config.model.trust_remote_code))
    prove(model, config.trainer.seed)
    kernel, _ = attention.choose_kernel(config.model.attn_implementation, device)
    attention.register(kernel)
    model.to(device)

    # 5. The steps. The only division is in `train_step`: by the targets of the whole batch.
    optimizer = build_optimizer(model.causal_lm, config.optim)
    schedule = Schedule(
        kind=config.optim.lr_scheduler,
        peak=config.optim.lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps(total_steps, config.optim.lr_warmup_steps, config.optim.warmup_steps_ratio),
        min_ratio=config.optim.min_lr_ratio,
        stable_ratio=config.optim.stable_ratio,
    )
    losses = []
    for batch in loader.batches(range(total_steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(batch.step)
        result = train_step(model, optimizer, batch, world, config.optim.clip_grad)
        losses.append(result.loss)
        print(f"step {batch.step + 1}/{total_steps}  loss {result.loss:.4f}  gradient norm {result.grad_norm:.3f}")

    # 6. A folder that transformers, RL and vLLM open: written aside, opened again, compared, then moved into place.
    options = ExportOptions(
        tokenizer=tokenizer,
        chat_template=None if is_own(tokenizer, template) else template.text,
        stop_token_ids=tuple(store.summary.stop_tokens),
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    save_model(model.causal_lm, base, Path(out), options, is_writer=True)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
