"""Set up what `verify` runs on: some of the user's rows, and a small copy of their model, in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from apollo_sft.checkpoint.room import available_memory
from apollo_sft.config.schema import DataConfig, ModelConfig, SftConfig
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
from apollo_sft.types import AddedTokens, Sample

ROWS = 16
"""The most rows of one step."""
TOKENS = 1024
"""With the small copy a longer row is cut to its last tokens."""
BYTES_PER_PARAMETER = 48
"""float64 weights, gradients, two moments, and the tensors that they are compared with."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A job that is ready to run."""

    job: Job

    description: list[tuple[str, str]]
    """Lines about it for a person, as (name, text)."""


def set_up(config: SftConfig, ranks: int, real_weights: bool, folder: Path) -> Rehearsal:
    """Prepare as a training does, then write rows, model and job into `folder`.

    Raises: ConfigError, DataError, ModelError as a training; ModelError when real weights do not fit into memory.
    """
    setup_logging(is_main=False)  # nothing but the table is shown
    load_external_lib(config.model.external_lib)
    attention.register(attention.sdpa_kernel)
    config = with_values(config, _changes(config.data))
    prepared = prepare(config)
    most_tokens = None
    if not real_weights:
        most_tokens = TOKENS

    samples = _slice(prepared.train, config.data.train_batch_size, most_tokens)

    vocabulary: np.ndarray | None = None
    new_tokens: AddedTokens | None = None
    if real_weights:
        _check_memory(prepared)
        base = prepared.base.folder
        new_tokens = prepared.base.new_tokens
        hf_config = silent(prepared.hf_config)
    else:
        vocabulary = np.unique(np.concatenate([sample.input_ids for sample in samples]))
        samples = [_renumbered(sample, vocabulary) for sample in samples]
        base = folder / "model"
        hf_config = shrink(prepared.hf_config, len(vocabulary), _number(prepared.hf_config, vocabulary))
        write_model(hf_config, base, config.trainer.seed)

    continued = None
    if real_weights:  # the user's adapter does not fit the small copy
        continued = config.model.lora_adapter_path

    config = with_values(config, _adapter(config.model, config.trainer.seed, base, continued, folder))
    _write_store(folder / "store", samples)
    lengths = [len(sample.input_ids) for sample in samples]
    job = Job(config, base, layouts(config, ranks, max(max(lengths), sum(lengths) // (4 * STEPS))), new_tokens)
    job.write(folder)

    description = _description(prepared, hf_config, samples, vocabulary)
    if config.model.lora_adapter_path is not None:
        description["model"] += ", with LoRA"
    return Rehearsal(job, list(description.items()))


def _changes(data: DataConfig) -> dict[str, Any]:
    """Return the keys for float64 on the CPU, a few rows and nothing random."""
    rows = min(data.train_batch_size, ROWS)
    limit = data.train_max_samples
    if limit == -1:
        limit = STEPS * rows
    return {
        "data.train_files": paths_of(data.train_files),
        "data.val_files": (),
        "data.train_batch_size": rows,
        "data.train_max_samples": limit,
        "model.fsdp_config.model_dtype": "fp64",
        "model.fsdp_config.dtype": "auto",
        "model.attn_implementation": "sdpa",
        "model.compile": False,
        "model.lora_dropout": 0.0,
        "model.load_in_4bit": False,
        "trainer.device": "cpu",
    }


def _slice(store: SampleStore, batch_size: int, most_tokens: int | None) -> list[Sample]:
    """Return the first rows that make two steps. Raises: DataError when nothing in them is a target."""
    samples = [store[i] for i in range(min(len(store), STEPS * batch_size))]
    if most_tokens is not None:
        samples = [Sample(s.input_ids[-most_tokens:], s.labels[-most_tokens:], s.ref, s.turns) for s in samples]

    trained = [sample for sample in samples if sample.num_targets]
    if not trained:
        raise DataError("the first rows hold no target", found=f"{len(samples)} rows from {store.ref(0)}")
    return trained


def _renumbered(sample: Sample, vocabulary: np.ndarray) -> Sample:
    """Return a sample whose token ids are counted among those that occur; labels too, where they are token ids."""
    ids = np.searchsorted(vocabulary, sample.input_ids)
    labels = np.where(sample.labels < 0, sample.labels, np.searchsorted(vocabulary, sample.labels))
    return Sample(ids.astype(np.int32), labels.astype(np.int32), sample.ref, sample.turns)


def _number(hf_config: Any, vocabulary: np.ndarray) -> int | None:
    """Return the padding token in the new numbers, if it occurs: transformers gives its embedding no gradient."""
    pad = hf_config.get_text_config().pad_token_id
    if pad is None or pad not in vocabulary:
        return None
    return int(np.searchsorted(vocabulary, pad))


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


def _adapter(model: ModelConfig, seed: int, base: Path, continued: str | None, folder: Path) -> dict[str, Any]:
    """Write an adapter whose A and B both matter, and return the key that names it; without LoRA nothing.

    A new adapter starts with B = 0, which would hide errors in A. `continued`: the user's own, which is kept.
    """
    adapter = lora.lora_config(model, str(base))
    if adapter is None:
        return {}

    adapter.lora_dropout = 0.0  # what is drawn at random cannot be compared
    loaded = load.load_with_weights(base, as_files_hold(base, model), torch.float32, model.trust_remote_code)
    lora.inject(loaded, adapter, torch.float32, continued)
    generator = torch.Generator().manual_seed(seed)
    tensors = adapter_files.adapter_tensors(loaded)
    if continued is None:
        tensors = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}

    adapter_files.saved_config(loaded).save_pretrained(folder / "adapter")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter" / "adapter_model.safetensors")
    return {"model.lora_adapter_path": str(folder / "adapter")}


def _check_memory(prepared: Prepared) -> None:
    """Raise ModelError when the host has no memory for the real weights."""
    num_parameters = sum(int(np.prod(spec.shape)) for spec in prepared.base.tensors.values())
    needed = num_parameters * BYTES_PER_PARAMETER
    free = available_memory()
    if needed > free:
        raise ModelError(
            "--real-weights runs the whole model in float64, which does not fit into this machine",
            found=f"{free / 2**30:.1f} GiB free",
            expected=f"about {needed / 2**30:.1f} GiB",
            fix="leave --real-weights out: the small copy has the same structure",
        )


def _description(
    prepared: Prepared, hf_config: Any, samples: list[Sample], vocabulary: np.ndarray | None
) -> dict[str, str]:
    """Return lines about model and rows, by name. `vocabulary`: the token ids of the small copy."""
    text = hf_config.get_text_config()
    name = ", ".join(hf_config.architectures or [type(hf_config).__name__])
    heads = f"{text.num_attention_heads} heads, {getattr(text, 'num_key_value_heads', None) or 'as many'} of keys"
    size = f"{text.num_hidden_layers} layers of {text.hidden_size}, {heads}"
    model = f"{name}, the real weights in float64: {size}"

    tokens = sum(len(sample.input_ids) for sample in samples)
    targets = sum(sample.num_targets for sample in samples)
    rows = f"{len(samples)} of yours in {STEPS} steps: {tokens:,} tokens, {targets:,} targets"
    if vocabulary is not None:
        model = f"{name}, a small copy in float64: {size}"
        rows += f", {len(vocabulary):,} different ones"
        cut = sum(length > TOKENS for length in prepared.train.lengths[: len(samples)])
        if cut:
            rows += f"; of {cut} the last {TOKENS:,} tokens"

    return {"model": model, "rows": rows}
