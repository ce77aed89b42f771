"""Export by one process: names, dtypes, shards, config files, memory, failures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.model_folder.reopen import verify_model_folder
from apollo_sft.checkpoint.model_folder.tensor_files import read_base_tensors, read_tensors
from apollo_sft.checkpoint.model_folder.write import export_model, save_model
from apollo_sft.errors import CheckpointError
from apollo_sft.types import BaseModel
from tests.support.exports import (
    CASES,
    base_on_disk,
    check_exported,
    logits,
    open_base,
    options,
    tiny_tokenizer,
)
from tests.support.models import tiny_model


def trained(case: str, seed: int = 1) -> object:
    """A live model with other weights than the base; made from a config, as every rank but the reading one does."""
    return tiny_model(CASES[case](), torch.float32, seed=seed)


@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_what_was_written_bit_for_bit(tmp_path: Path, case: str) -> None:
    base = base_on_disk(tmp_path / "base", case)
    model = trained(case)
    result = save_model(model, base, tmp_path / "out", options(), True)
    assert result.dropped == ()
    check_exported(tmp_path / "out", base, logits(model))


def test_experts_are_fused_in_memory_and_apart_in_the_files(tmp_path: Path) -> None:
    base = base_on_disk(tmp_path / "base", "qwen3-moe")
    held = set(trained("qwen3-moe").state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj" in held, "otherwise this test proves nothing"
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in base.tensors


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral"])
def test_a_base_with_fused_files_is_followed(tmp_path: Path, case: str) -> None:
    tiny_model(CASES[case](), torch.float32).save_pretrained(tmp_path / "base", save_original_format=False)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base")
    assert any(name.endswith("experts.gate_up_proj") for name in base.tensors)
    model = trained(case)
    save_model(model, base, tmp_path / "out", options(), True)
    check_exported(tmp_path / "out", base, logits(model))


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> BaseModel:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensor for name, tensor in change.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if change.get(name, tensor) is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return open_base(folder)


def test_a_tied_head_is_written_once_when_the_base_wrote_it_twice(tmp_path: Path) -> None:
    once = base_on_disk(tmp_path / "base", "qwen2-tied")
    assert "lm_head.weight" not in once.tensors
    embedding = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    base = rewrite(tmp_path / "base", {"lm_head.weight": embedding.clone()})
    model = trained("qwen2-tied")
    result = save_model(model, base, tmp_path / "out", options(), True)
    check_exported(tmp_path / "out", once, logits(model))
    assert result.dropped == ("lm_head.weight",)


def test_names_without_the_prefix_of_the_base_model_come_back(tmp_path: Path) -> None:
    base_on_disk(tmp_path / "base", "qwen2-tied")
    path = tmp_path / "base" / "model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    base = open_base(tmp_path / "base")
    model = trained("qwen2-tied")
    save_model(model, base, tmp_path / "out", options(), True)
    check_exported(tmp_path / "out", base, logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint16])
def test_what_the_model_does_not_hold_is_copied_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """A layer of multi-token prediction, and a buffer of an earlier version of the architecture."""
    base_on_disk(tmp_path / "base", "llama-untied")
    more = {
        "model.layers.2.mlp.up_proj.weight": torch.arange(64).to(dtype).reshape(2, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
    }
    base = rewrite(tmp_path / "base", more)
    model = trained("llama-untied")
    result = save_model(model, base, tmp_path / "out", options(max_shard_bytes=9_000), True)
    assert result.dropped == ()
    assert read_base_tensors(tmp_path / "out") == base.tensors
    written = {name: stored.path for name, stored in read_tensors(tmp_path / "out").items()}
    for name, tensor in more.items():
        copied = load_file(written[name])[name]
        assert torch.equal(copied.view(torch.uint8), tensor.view(torch.uint8))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("wanted", ["bf16", "fp16"])
def test_a_forced_dtype_leaves_copied_tensors_as_they_are(tmp_path: Path, wanted: str) -> None:
    """Such as the mask of an earlier version, whose values float16 cannot hold."""
    base_on_disk(tmp_path / "base", "llama-untied")
    base = rewrite(tmp_path / "base", {"h.0.attn.masked_bias": torch.tensor(-1e9)})
    save_model(trained("llama-untied"), base, tmp_path / "out", options(export_dtype=wanted), True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["h.0.attn.masked_bias"], torch.tensor(-1e9))
    assert written["lm_head.weight"].dtype != torch.float32


FORMS = {
    "by transformers 4": lambda raw: json.dumps(raw, indent=2, sort_keys=True) + "\n",
    "by hand": lambda raw: json.dumps(raw, indent=4),
    "compact": lambda raw: json.dumps(raw, separators=(",", ":")),
    "one line": lambda raw: json.dumps(raw, ensure_ascii=True) + "\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_json_that_training_does_not_change_keeps_its_bytes(tmp_path: Path, form: str) -> None:
    base = base_on_disk(tmp_path / "base", "qwen2-tied")
    raw = base.config | {"_name_or_path": "somewhere", "own_key": {"_private": 1, "é": [2, {"b": None}]}}
    generation = {"eos_token_id": [9, 2], "temperature": 0.6, "top_p": 0.9, "_from_model_config": True}
    (tmp_path / "base" / "config.json").write_text(FORMS[form](raw), encoding="utf-8")
    (tmp_path / "base" / "generation_config.json").write_text(FORMS[form](generation), encoding="utf-8")
    base = open_base(tmp_path / "base")
    save_model(trained("qwen2-tied"), base, tmp_path / "out", options(chat_template=None), True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes(), name


@pytest.mark.parametrize("form", FORMS)
def test_json_that_training_changes_keeps_its_form(tmp_path: Path, form: str) -> None:
    base = base_on_disk(tmp_path / "base", "qwen2-tied")
    raw = {"zeta": "é", "torch_dtype": "float32", **base.config, "text": {"torch_dtype": "float32", "b": [1, 2]}}
    del raw["dtype"]
    (tmp_path / "base" / "config.json").write_text(FORMS[form](raw), encoding="utf-8")
    base = open_base(tmp_path / "base")
    save_model(trained("qwen2-tied"), base, tmp_path / "out", options(export_dtype="bf16"), True)
    expected = raw | {"torch_dtype": "bfloat16", "text": {"torch_dtype": "bfloat16", "b": [1, 2]}}
    assert (tmp_path / "out" / "config.json").read_text() == FORMS[form](expected)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_dtype_that_the_base_does_not_state_is_stated_only_when_it_changes(tmp_path: Path) -> None:
    base = base_on_disk(tmp_path / "base", "qwen2-tied")
    raw = {key: value for key, value in base.config.items() if key != "dtype"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    base = open_base(tmp_path / "base")
    for dtype, stated in (("auto", None), ("bf16", "bfloat16")):
        save_model(trained("qwen2-tied"), base, tmp_path / dtype, options(export_dtype=dtype), True)
        assert json.loads((tmp_path / dtype / "config.json").read_text()).get("torch_dtype") == stated


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (
            {"eos_token_id": 9, "temperature": 0.6, "top_p": 0.9},
            {"eos_token_id": [2, 9], "temperature": 0.6, "top_p": 0.9},
        ),
        ({"eos_token_id": [9, 2], "do_sample": True}, {"eos_token_id": [9, 2], "do_sample": True}),
        ({"eos_token_id": 2, "repetition_penalty": 1.1}, {"eos_token_id": 2, "repetition_penalty": 1.1}),
        ({"eos_token_id": 9, "pad_token_id": -1}, {"eos_token_id": [2, 9], "pad_token_id": -1}),
        ({"bos_token_id": 1}, {"bos_token_id": 1, "eos_token_id": 2}),
        (None, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    ],
)
def test_generation_ends_where_training_ended(
    tmp_path: Path, own: dict[str, object] | None, expected: dict[str, object]
) -> None:
    """Nothing else changes: sampling defaults stay, as vLLM reads them with and without `do_sample`."""
    base_on_disk(tmp_path / "base", "qwen2-tied")
    path = tmp_path / "base" / "generation_config.json"
    path.unlink(missing_ok=True)
    if own is not None:
        path.write_text(json.dumps(own))
    base = open_base(tmp_path / "base")
    save_model(trained("qwen2-tied"), base, tmp_path / "out", options(), True)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    base = base_on_disk(tmp_path / "base", "qwen2-tied")
    before = os.umask(umask)
    try:
        save_model(trained("qwen2-tied"), base, tmp_path / "out", options(), True)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_the_tokenizer_in_use_is_not_changed(tmp_path: Path) -> None:
    base = base_on_disk(tmp_path / "base", "qwen2-tied")
    chosen = options()
    save_model(trained("qwen2-tied"), base, tmp_path / "out", chosen, True)
    assert chosen.tokenizer.chat_template is None


def test_a_full_disk_is_told_and_leaves_nothing_that_loads(tmp_path: Path) -> None:
    import resource
    import signal

    base = base_on_disk(tmp_path / "base", "llama-untied")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save_model(trained("llama-untied"), base, tmp_path / "out", options(), True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    publish.recover(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_one_bit_flipped_after_writing_is_found(tmp_path: Path) -> None:
    base = base_on_disk(tmp_path / "base", "llama-untied")
    staging = publish.staging_folder(tmp_path, "model")
    result = export_model(trained("llama-untied"), base, staging, options(), True)
    verify_model_folder(staging, result.tensors, result.digests)
    path = staging / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        verify_model_folder(staging, result.tensors, result.digests)


def test_the_writer_holds_one_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the writer's own bookkeeping: a tensor of the next shard never meets one of an unwritten shard."""
    from apollo_sft.checkpoint.model_folder.tensor_files import ShardWriter

    base = base_on_disk(tmp_path / "base", "qwen3-moe")
    most = 0
    add = ShardWriter.add

    def watched(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal most
        add(self, name, tensor)
        most = max(most, sum(t.numel() * t.element_size() for held in self._held.values() for t in held.values()))

    monkeypatch.setattr(ShardWriter, "add", watched)
    save_model(trained("qwen3-moe"), base, tmp_path / "out", options(max_shard_bytes=30_000), True)
    assert 10_000 < most <= 30_000


def test_the_model_trained_from_a_loaded_base_gives_the_same_files(tmp_path: Path) -> None:
    """The reading rank's model comes from `from_pretrained`, which remembers its conversion; the result is the same."""
    base = base_on_disk(tmp_path / "base", "qwen3-moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    save_model(model, base, tmp_path / "out", options(), True)
    check_exported(tmp_path / "out", base, logits(model))
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
