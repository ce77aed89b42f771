"""What `verify` runs on: some of the user's rows, and a small copy of their model, in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from apollo_sft.checkpoint.room import available_memory
from apollo_sft.config.schema import SftConfig
from apollo_sft.config.sources import paths_of
from apollo_sft.config.values import with_values
from apollo_sft.data.store.store_files import SampleStore, StoreSummary, StoreWriter
from apollo_sft.errors import DataError, ModelError
from apollo_sft.model import adapter_files, attention, load, lora
from apollo_sft.report.log import setup_logging
from apollo_sft.tools.verify.layouts import STEPS, layouts
from apollo_sft.tools.verify.small_copy import shrink, silent, write_model
from apollo_sft.tools.verify.worker import Job
from apollo_sft.train.base_model import as_files_hold
from apollo_sft.train.prepare_run import Prepared, prepare
from apollo_sft.train.process import load_external_lib
from apollo_sft.types import Sample

ROWS = 16
"""Most rows of one step."""
TOKENS = 1024
"""Of a longer row, the last ones stand for it in the small copy."""
BYTES_PER_PARAMETER = 48
"""float64 weights, gradients, two moments, and what is compared with them."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The job, and what a person should know of it."""

    job: Job
    description: list[tuple[str, str]]


def rehearse(config: SftConfig, ranks: int, real_weights: bool, folder: Path) -> Rehearsal:
    """Prepare as a training does, then write rows, model and job into `folder`.

    Raises: ConfigError, DataError, ModelError as a training; ModelError when real weights do not fit into memory.
    """
    setup_logging(is_main=False)  # the table speaks
    load_external_lib(config.model.external_lib)
    attention.register(attention.sdpa_kernel)
    config = with_values(config, _changes(config))
    prepared = prepare(config)
    samples = _slice(prepared.train, config, None if real_weights else TOKENS)
    if real_weights:
        base, hf_config, vocabulary = prepared.base.folder, silent(prepared.hf_config), None
        growth = prepared.base.growth
        _check_memory(prepared)
    else:
        vocabulary = np.unique(np.concatenate([sample.input_ids for sample in samples]))
        samples = [_renumbered(sample, vocabulary) for sample in samples]
        base, growth = folder / "model", None
        hf_config = shrink(prepared.hf_config, len(vocabulary), _number(prepared.hf_config, vocabulary))
        write_model(hf_config, base, config.trainer.seed)
    config = with_values(config, _adapter(config, base, real_weights, folder))
    _write_store(folder / "store", samples)
    lengths = [len(sample.input_ids) for sample in samples]
    job = Job(config, base, layouts(config, ranks, max(max(lengths), sum(lengths) // (4 * STEPS))), growth)
    job.write(folder)
    return Rehearsal(job, _description(prepared, hf_config, samples, config, vocabulary))


def _changes(config: SftConfig) -> dict[str, Any]:
    """What float64 on the CPU, a few rows and nothing random ask for."""
    rows = min(config.data.train_batch_size, ROWS)
    limit = config.data.train_max_samples
    return {
        "data.train_files": paths_of(config.data.train_files),
        "data.val_files": (),
        "data.train_batch_size": rows,
        "data.train_max_samples": STEPS * rows if limit == -1 else limit,
        "model.fsdp_config.model_dtype": "fp64",
        "model.fsdp_config.dtype": "auto",
        "model.attn_implementation": "sdpa",
        "model.compile": False,
        "model.lora_dropout": 0.0,
        "model.load_in_4bit": False,
        "trainer.device": "cpu",
    }


def _slice(store: SampleStore, config: SftConfig, most_tokens: int | None) -> list[Sample]:
    """The first rows that make two steps. Raises: DataError when nothing in them is a target."""
    samples = [store[i] for i in range(min(len(store), STEPS * config.data.train_batch_size))]
    if most_tokens is not None:
        samples = [Sample(s.input_ids[-most_tokens:], s.labels[-most_tokens:], s.ref, s.turns) for s in samples]
    trained = [sample for sample in samples if sample.num_targets]
    if not trained:
        raise DataError("the first rows hold no target", found=f"{len(samples)} rows from {store.ref(0)}")
    return trained


def _renumbered(sample: Sample, vocabulary: np.ndarray) -> Sample:
    """Token ids counted among those that occur; labels too, where they are no marks."""
    ids = np.searchsorted(vocabulary, sample.input_ids)
    labels = np.where(sample.labels < 0, sample.labels, np.searchsorted(vocabulary, sample.labels))
    return Sample(ids.astype(np.int32), labels.astype(np.int32), sample.ref, sample.turns)


def _number(hf_config: Any, vocabulary: np.ndarray) -> int | None:
    """The padding token keeps its meaning: transformers gives its embedding no gradient."""
    pad = hf_config.get_text_config().pad_token_id
    return None if pad is None or pad not in vocabulary else int(np.searchsorted(vocabulary, pad))


def _write_store(folder: Path, samples: list[Sample]) -> None:
    folder.mkdir()
    files = sorted({sample.ref.file for sample in samples})
    writer = StoreWriter(folder, files)
    for sample in samples:
        writer.add(sample)
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    num_targets = sum(sample.num_targets for sample in samples)
    summary = StoreSummary(files, len(samples), len(samples), num_tokens, num_targets)
    writer.finish("verify", summary)


def _adapter(config: SftConfig, base: Path, real_weights: bool, folder: Path) -> dict[str, Any]:
    """With LoRA: an adapter whose A and B both matter, as a folder to go on with. A new one would start with B = 0."""
    adapter = lora.lora_config(config.model, str(base))
    if adapter is None:
        return {}
    adapter.lora_dropout = 0.0
    continued = config.model.lora_adapter_path if real_weights else None
    model = load.load_with_weights(base, as_files_hold(base, config), torch.float32, config.model.trust_remote_code)
    lora.inject(model, adapter, torch.float32, continued)
    generator = torch.Generator().manual_seed(config.trainer.seed)
    tensors = adapter_files.adapter_tensors(model)
    if continued is None:
        tensors = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    adapter_files.saved_config(model).save_pretrained(folder / "adapter")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter" / "adapter_model.safetensors")
    return {"model.lora_adapter_path": str(folder / "adapter")}


def _check_memory(prepared: Prepared) -> None:
    """Raises: ModelError."""
    num_parameters = sum(int(np.prod(spec.shape)) for spec in prepared.base.tensors.values())
    needed, free = num_parameters * BYTES_PER_PARAMETER, available_memory()
    if needed > free:
        raise ModelError(
            "--real-weights runs the whole model in float64, which does not fit into this machine",
            found=f"{free / 2**30:.1f} GiB free",
            expected=f"about {needed / 2**30:.1f} GiB",
            fix="leave --real-weights out: the small copy has the same structure",
        )


def _description(
    prepared: Prepared, hf_config: Any, samples: list[Sample], config: SftConfig, vocabulary: np.ndarray | None
) -> list[tuple[str, str]]:
    text = hf_config.get_text_config()
    name = ", ".join(hf_config.architectures or [type(hf_config).__name__])
    heads = f"{text.num_attention_heads} heads, {getattr(text, 'num_key_value_heads', None) or 'as many'} of keys"
    size = f"{text.num_hidden_layers} layers of {text.hidden_size}, {heads}"
    model = f"{name}, the real weights in float64: {size}"
    tokens, targets = sum(len(s.input_ids) for s in samples), sum(s.num_targets for s in samples)
    rows = f"{len(samples)} of yours in {STEPS} steps: {tokens:,} tokens, {targets:,} targets"
    if vocabulary is not None:
        model = f"{name}, a small copy in float64: {size}"
        rows += f", {len(vocabulary):,} different ones"
    if (
        cut := sum(length > TOKENS for length in prepared.train.lengths[: len(samples)])
        if vocabulary is not None
        else 0
    ):
        rows += f"; of {cut} the last {TOKENS:,} tokens"
    if config.model.lora_adapter_path is not None:
        model += ", with LoRA"
    return [("model", model), ("rows", rows)]
