"""The end of a LoRA run: the merged model is opened again and must say what base and adapter said."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import CheckpointError
from apollo_sft.train.merged import check_merged, probe_of
from tests.support.data import CHATML
from tests.support.forked import train_on_ranks
from tests.support.runs import train_here, write_inputs

FEW = (
    "trainer.total_training_steps=3",
    "data.val_files=null",
    "model.lora_rank=3",
    "model.lora_dropout=0.2",
    "optim.lr=0.1",
)
OPENED = "opened again, the merged model gives the loss of base and adapter"
HEAD = "model.target_modules=[q_proj,lm_head,embed_tokens]"
WHOLE = "model.modules_to_save=[lm_head,norm]"


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (1, ["model.fsdp_config.dtype=bf16"]),
        (1, [HEAD]),
        (2, ["ulysses_sequence_parallel_size=2", HEAD]),
        (2, ["model.use_dora=true", WHOLE]),
        (2, ["model.strategy=fsdp", "model.use_dora=true"]),
    ],
    ids=["bf16", "head", "sp 2, head", "DoRA", "fsdp, DoRA"],
)
def test_a_merged_model_is_opened_again(tmp_path: Path, ranks: int, keys: list[str]) -> None:
    inputs = write_inputs(tmp_path)
    out = tmp_path / "out"
    codes = train_on_ranks(inputs, out, ranks, *FEW, *keys, "trainer.logger=[console]")
    said = (tmp_path / "ranks.log").read_text()
    assert codes == [0] * ranks, said[-3000:]
    assert OPENED in said
    model = AutoModelForCausalLM.from_pretrained(out)
    assert "peft" not in type(model).__module__
    base = load_file(inputs / "model" / "model.safetensors")
    merged = load_file(out / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    wanted = {"lm_head.weight", "model.embed_tokens.weight"} if HEAD in keys else {"model.layers.0.mlp.up_proj.weight"}
    assert wanted <= changed
    if "model.fsdp_config.dtype=bf16" not in keys:  # there the base is kept in bf16, and that is what was trained
        assert ("model.norm.weight" in changed) == (WHOLE in keys)


def test_experts_are_handed_over_one_by_one_as_the_base_has_them(tmp_path: Path) -> None:
    """Trained and merged in one tensor a layer, cut over two ranks; five experts, so that the shards are uneven."""
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    inputs = write_inputs(tmp_path, family="Qwen3Moe", **experts)
    out = tmp_path / "out"
    plain = [key for key in FEW if "dropout" not in key]
    codes = train_on_ranks(inputs, out, 2, *plain, "trainer.logger=[console]")
    said = (tmp_path / "ranks.log").read_text()
    assert codes == [0, 0], said[-3000:]
    assert OPENED in said
    base, merged = (load_file(folder / "model.safetensors") for folder in (inputs / "model", out))
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    wanted = {f"experts.{number}.{name}_proj.weight" for number in range(5) for name in ("gate", "up", "down")}
    assert wanted <= {name.partition(".mlp.")[2] for name in changed}
    assert not [name for name in changed if name.endswith("mlp.gate.weight")], "routers stay"


def test_a_wrong_merge_is_not_handed_over(tmp_path: Path) -> None:
    """One matrix that was forgotten shows in the loss of one sample."""
    inputs = write_inputs(tmp_path)
    out = tmp_path / "out"
    assert train_on_ranks(inputs, out, 1, *FEW, "trainer.logger=[console]") == [0]
    store = SampleStore(next(path.parent for path in (inputs / "store").rglob("lengths*")))
    probe = probe_of(store)
    ids, labels = (torch.from_numpy(part.astype("int64")) for part in (probe.input_ids, probe.labels))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out)(ids[None]).logits[0]
    live = float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    check_merged(out, probe, live, torch.float32, False)
    file = out / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(load_file(file) | {name: load_file(inputs / "model" / file.name)[name]}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gives another loss than base \+ adapter"):
        check_merged(out, probe, live, torch.float32, False)


def test_an_adapter_alone_opens_from_anywhere_with_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base was named by a relative path, and the template is not the base's own."""
    inputs = write_inputs(tmp_path / "inputs")
    monkeypatch.chdir(inputs)
    template = CHATML.replace("<|im_end|>", "<|end|>")
    (inputs / "own.jinja").write_text(template)
    more = ("model.lora_rank=2", "trainer.export=adapter", "data.chat_template=own.jinja")
    train_here(inputs, tmp_path / "run", "model.partial_pretrain=./model", "trainer.total_training_steps=2", *more)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / "latest" / "hf"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == template
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(inputs / "model")
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert model.peft_config["default"].r == 2
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.name[0] != "."}
        assert len(modes) == 1
        assert not (folder / "config.json").exists()
