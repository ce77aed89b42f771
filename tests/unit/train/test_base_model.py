"""The base model's folder: what is refused by name before anything is read, and links that are followed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from apollo_sft.checkpoint.model_folder.base_files import OF_A_RUN, OTHER_WEIGHTS, sort_files
from apollo_sft.config.compose import compose
from apollo_sft.errors import ModelError
from apollo_sft.train.base_model import open_base
from apollo_sft.train.prepare_run import prepare
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.runs import arguments, train_here, write_inputs


def config_of(base: Path, *more: str) -> Any:
    return compose([f"model.partial_pretrain={base}", "data.train_files=x", "data.val_files=null", *more]).config


def refused(base: Path, *more: str) -> str:
    with pytest.raises(ModelError) as caught:
        open_base(config_of(base, *more))
    return str(caught.value)


def test_an_adapter_in_the_place_of_the_model_names_the_keys(tmp_path: Path) -> None:
    adapter = save_tiny_adapter(save_tiny_model(tmp_path / "base", tiny_config()))
    message = refused(adapter)
    assert "is a LoRA adapter, not a model" in message
    assert f"model.partial_pretrain={tmp_path / 'base'} model.lora_adapter_path={adapter}" in message


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_config())
    shutil.copytree(save_tiny_adapter(base), tmp_path / "kept")
    shutil.copy(tmp_path / "kept" / "adapter_config.json", base)
    message = refused(base)
    assert "holds a model and an adapter" in message
    assert "set model.lora_adapter_path to that folder" in message


@pytest.mark.parametrize(
    ("prefix", "who"), [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel"), ("x.", None)]
)
def test_names_of_a_wrapped_model_are_told(tmp_path: Path, prefix: str, who: str | None) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_config())
    weights = load_file(base / "model.safetensors")
    save_file({f"{prefix}{name}": value for name, value in weights.items()}, base / "model.safetensors")
    if who is None:
        assert f"{prefix}lm_head.weight" in open_base(config_of(base))[0].tensors
        return
    message = refused(base)
    assert f"those of a model wrapped by {who}" in message
    assert f"such as {prefix}" in message


def test_a_link_to_a_snapshot_of_the_hub_is_followed(tmp_path: Path) -> None:
    """Files of a snapshot are links to blobs beside it; the user's link leads to the snapshot."""
    plain = save_tiny_model(tmp_path / "plain", tiny_config())
    root = tmp_path / "hub" / "models--someone--model"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        blob = root / "blobs" / f"{number:040}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (tmp_path / "mine").symlink_to(snapshot)
    base, _ = open_base(config_of(tmp_path / "mine"))
    assert base.tensors == open_base(config_of(plain))[0].tensors
    assert "config.json" in base.carried
    (snapshot / "stray.json").symlink_to(tmp_path / "plain" / "config.json")
    assert "is a link out of its folder" in refused(tmp_path / "mine")


def test_files_of_earlier_runs_and_other_models_stay_behind(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_config())
    for name in ("README.md", "code/a.py", "checkpoint-5/config.json", "checkpoint-5/model.safetensors", "x.gguf"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    (base / "metrics.jsonl").write_text("{}")
    (base / "runs").mkdir()
    (base / "runs" / "events.out.tfevents.1.host").write_text("")
    (base / "leads").symlink_to(tmp_path)
    (base / "away.bin.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "nowhere.txt").write_text("private")
    found, _ = open_base(config_of(base, "model.follow_links=true", "model.trust_remote_code=true"))
    assert found.carried == ("README.md", "away.bin.txt", "code/a.py", "config.json", "generation_config.json")
    files = sort_files(base)
    assert "away.bin.txt" not in files.carried
    assert list(files.left_out) == [
        "away.bin.txt",
        "checkpoint-5/",
        "code/a.py",
        "leads/",
        "metrics.jsonl",
        "runs/events.out.tfevents.1.host",
        "x.gguf",
    ]


def test_a_run_that_is_the_base_or_lies_in_it_leaves_its_records_behind(tmp_path: Path) -> None:
    """Files that were put beside its model later are part of the base."""
    inputs = write_inputs(tmp_path)
    train_here(inputs, inputs / "model" / "first", "trainer.total_training_steps=1")
    first = inputs / "model" / "first"
    (first / "NOTES.md").write_text("mine")
    assert sort_files(inputs / "model").left_out["first/"] == OF_A_RUN
    files = sort_files(first)
    assert {"NOTES.md", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(files.carried)
    records = {"run.json", "metrics.jsonl", "config.yaml", "data_audit.json", "checkpoints/"}
    assert records <= {name for name, why in files.left_out.items() if why == OF_A_RUN}


def test_shards_of_no_model_are_named(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_config())
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    assert sort_files(base).left_out == {"consolidated.safetensors": OTHER_WEIGHTS}


def test_words_of_the_vocabulary_that_become_control_tokens_are_written(tmp_path: Path) -> None:
    """No row is added for them, so that nothing grows; without the entry readers would cut them into pieces."""
    inputs = write_inputs(tmp_path)
    path = inputs / "model" / "tokenizer.json"
    raw = json.loads(path.read_text())
    marks = ["<|im_start|>", "<|im_end|>"]
    raw["added_tokens"] = [entry for entry in raw["added_tokens"] if entry["content"] not in marks]
    path.write_text(json.dumps(raw))
    config_path = inputs / "model" / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    for key in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"):
        config.pop(key, None)
    config_path.write_text(json.dumps(config))
    before = AutoTokenizer.from_pretrained(inputs / "model")
    assert len(before("<|im_start|>", add_special_tokens=False)["input_ids"]) > 1
    out = tmp_path / "out"
    train_here(inputs, out, "model.add_special_tokens=true", "trainer.total_training_steps=1")
    after = AutoTokenizer.from_pretrained(out)
    ids = after("<|im_start|>x<|im_end|>", add_special_tokens=False)["input_ids"]
    assert [ids[0], ids[-1]] == [before.convert_tokens_to_ids(mark) for mark in marks]
    assert len(after) == len(before)


def test_a_tokenizer_that_cannot_be_changed_in_its_files_is_told_before_data_are_read(tmp_path: Path) -> None:
    """Its template is code's, so that no file of the folder decides what it is."""
    inputs = write_inputs(tmp_path)
    raw = (inputs / "model" / "tokenizer_config.json").read_text()
    own = '"auto_map": {"AutoTokenizer": ["own.Stubborn", "own.Stubborn"]}, '
    (inputs / "model" / "tokenizer_config.json").write_text(raw.replace("{", "{" + own, 1))
    (inputs / "model" / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Stubborn(PreTrainedTokenizerFast):\n"
        "    chat_template = property(lambda self: 'fixed', lambda self, value: None)\n"
    )
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    keys = arguments(inputs, tmp_path / "out", "model.trust_remote_code=true", f"data.chat_template='{template}'")
    with pytest.raises(ModelError, match="another chat template in the changed files"):
        prepare(compose(keys).config)
    assert not (inputs / "store").exists()
