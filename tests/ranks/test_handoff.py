"""`apollo-sft handoff`: our folders pass; every broken one fails by a name of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from apollo_sft.checkpoint.model_folder.tensor_files import write_tensors
from apollo_sft.cli.main import main
from tests.support.chain import write_chain_model
from tests.support.data import tiny_tokenizer, write_parquet
from tests.support.exports import MOE
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config, tiny_model
from tests.support.runs import train_here

ROOT = Path(__file__).resolve().parents[2]
FACTS = ("run.json", "config.yaml", "data_audit.json")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENTLE = ("optim.lr=1e-6", "trainer.total_training_steps=2", "data.train_batch_size=4", "data.val_files=null")


def _train(folder: Path, family: str, *more: str) -> Path:
    write_chain_model(folder / "base", family)
    rows = [{"question": f"What is {n} and one?", "answer": "\\boxed{7}"} for n in range(20)]
    write_parquet(folder / "train.parquet", rows)
    train_here(folder, folder / "run", f"model.partial_pretrain={folder / 'base'}", *GENTLE, *more)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("run"), "Qwen2")


def _results(
    folder: Path | str, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code and what each check found."""
    code = main(["handoff", str(folder), "--json", *more])
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] == (code == 0)
    return code, {check["check"]: check for check in found["checks"]}


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
@pytest.mark.parametrize("lora", [(), ("model.lora_rank=2",)], ids=["full", "lora"])
def test_what_we_write_passes(
    family: str, lora: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _train(tmp_path, family, *lora)
    folders = [out] if lora else [out, out / "checkpoints" / "latest" / "hf"]
    assert main(["export", str(out), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    for folder in (*folders, tmp_path / "exported"):
        code, found = _results(f"{folder}/", capsys)
        assert code == 0
        assert {name for name, check in found.items() if check["state"] != "pass"} == {"readers"}
        assert found["readers"]["name"] == "tokenizer_form", "this base was written by transformers 5"
        if folder != tmp_path / "exported":
            assert found["template"]["what"].startswith("16 prompts of 16 samples as training rendered them")
        assert found["generation"]["what"].startswith(("4 of 4", "1 of 1"))


def _json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return change


def _without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        write_tensors(tensors, folder / WEIGHTS)

    return rewrite


def _sharded(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    weight_map = {}
    for number, shard in enumerate((head, tensors), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        write_tensors(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _sharded_then(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        _sharded(folder)
        change(folder)

    return broken


def _mapped(name: str, to: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = to
        (folder / INDEX).write_text(json.dumps(index))

    return change


def _linked_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def _with_one_token_more(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["new_word"])
    tokenizer.save_pretrained(folder)


def _without_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _never_stopping(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")] = -1.0


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name.replace(".weight", ".base_layer.weight")] = tensors.pop(name)


def _compiled(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def _stored_twice(folder: Path) -> None:
    _json("config.json", tie_word_embeddings=True)(folder)
    _weights(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))(folder)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")


def _adapter_beside(folder: Path) -> None:
    for path in save_tiny_adapter(folder).iterdir():
        shutil.copyfile(path, folder / path.name)


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])


OTHER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_STOP = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BROKEN: dict[str, Callable[[Path], None]] = {
    "missing_template": _without("chat_template.jinja"),
    "wrong_stop_ids": _json("generation_config.json", eos_token_id=0),
    "wrong_stop_ids: none": _json("generation_config.json", eos_token_id=None),
    "wrong_stop_ids: a word": _json("generation_config.json", eos_token_id=[2, 40]),
    "wrong_stop_ids: of another template": _text("chat_template.jinja", OTHER_STOP),
    "eos_differs": _json("tokenizer_config.json", eos_token="<|endoftext|>"),
    "eos_differs: config.json": _json("config.json", eos_token_id=0),
    "peft_names": _weights(_renamed),
    "wrapped_names": _weights(_compiled),
    "adapter_beside_model": _adapter_beside,
    "unreadable_files": lambda folder: (folder / WEIGHTS).chmod(0o600),
    "dtype_differs": _json("config.json", dtype="bfloat16"),
    "tie_differs": _json("config.json", tie_word_embeddings=True),
    "untied_copy": _stored_twice,
    "missing_shard": _sharded_then(_without("model-00002-of-00002.safetensors")),
    "missing_index": _sharded_then(_without(INDEX)),
    "index_differs": _sharded_then(_mapped("lm_head.weight", "model-00002-of-00002.safetensors")),
    "file_outside": _sharded_then(_mapped("lm_head.weight", "../elsewhere.safetensors")),
    "file_outside: by a link": _linked_out,
    "stray_weights": _sharded_then(lambda folder: write_tensors({"a": torch.ones(1)}, folder / "old.safetensors")),
    "damaged_weights": _truncated,
    "damaged_json": _text("config.json", "{"),
    "vocab_mismatch": _with_one_token_more,
    "pickle_weights": _pickled,
    "unknown_architecture": _json("config.json", architectures=["FSDPQwen2ForCausalLM"]),
    "unknown_architecture: type": _json("config.json", model_type="nobody"),
    "unknown_architecture: another class": _json("config.json", architectures=["Qwen2ForSequenceClassification"]),
    "own_code": _json("config.json", auto_map={"AutoConfig": "code.Config"}),
    "missing_config": _without("config.json"),
    "missing_tokenizer": _without("tokenizer.json"),
    "missing_generation_config": _without("generation_config.json"),
    "missing_weights": _without(WEIGHTS),
    "missing_tensors": _weights(lambda tensors: tensors.pop("model.norm.weight")),
    "unexpected_tensors": _weights(lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)})),
    "shape_differs": _weights(_other_shape),
    "tokenizer_fails": _text("tokenizer.json", "{}"),
    "template_differs": _text("chat_template.jinja", OTHER_TEMPLATE),
    "template_fails": _text("chat_template.jinja", "{{ raise_exception('no') }}"),
    "tokens_differ": _without_merges,
    "does_not_stop": _weights(_never_stopping),
}


def _copy(run: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in run.iterdir():
        if path.is_file() and (path.suffix in (".json", ".jinja", ".safetensors") or path.name in FACTS):
            shutil.copy(path, folder / path.name)
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_fails_by_its_own_name(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(run, tmp_path / "model")
    BROKEN[case](folder)
    code, found = _results(folder, capsys)
    assert code == 2
    wrong = [check for check in found.values() if check["state"] == "wrong"]
    assert [check["name"] for check in wrong] == [case.split(":")[0]]
    assert wrong[0]["fix"]


def test_an_unbroken_copy_and_shards_pass(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _copy(run, tmp_path / "model")
    assert _results(folder, capsys)[0] == 0
    _sharded(folder)
    code, found = _results(folder, capsys, "--no-generate")
    assert (code, found["generation"]["state"]) == (0, "skipped")
    assert found["weights"]["what"].endswith("in 2 files")


def test_a_missing_expert_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "model", tiny_config("Qwen3Moe", vocab_size=360, **MOE))
    (folder / WEIGHTS).chmod(0o644)
    tiny_tokenizer(eos_token="<|im_end|>").save_pretrained(folder)
    _text("generation_config.json", '{"eos_token_id": 2}')(folder)
    assert _results(folder, capsys, "--no-generate")[0] == 0
    _weights(lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))(folder)
    code, found = _results(folder, capsys, "--no-generate")
    assert (code, found["names"]["name"]) == (2, "missing_tensors")
    assert "experts.3.up_proj" in found["names"]["what"]


def test_edited_files_are_a_note(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the base is gone, nothing else would show that the template is not the trained one."""
    folder = _copy(run, tmp_path / "model")
    gone = (folder / "config.yaml").read_text().replace(str(run.parent / "base"), str(tmp_path / "gone"))
    (folder / "config.yaml").write_text(gone)
    assert "the base model is not here" in _results(folder, capsys)[1]["template"]["what"]
    (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    code, found = _results(folder, capsys, "--no-generate")
    assert (code, found["files"]["name"]) == (0, "changed_files")
    assert "chat_template.jinja" in found["files"]["what"]
    hf = run / "checkpoints" / "latest" / "hf"
    edited = tmp_path / "step"
    shutil.copytree(hf.parent, edited)
    _json("generation_config.json", top_k=3)(edited / "hf")
    assert "generation_config.json" in _results(edited / "hf", capsys, "--no-generate")[1]["files"]["what"]


def _in_the_form_of_version_4(folder: Path) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"rope_theta": raw.pop("rope_parameters")["rope_theta"], "torch_dtype": raw.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _experts_in_one_tensor(folder: Path) -> None:
    """Those of a Mixtral, in the place of the model that was there."""
    moe = tiny_config("Mixtral", vocab_size=360, num_local_experts=4, eos_token_id=2)
    tiny_model(moe, torch.float32).save_pretrained(folder, save_original_format=False)
    _in_the_form_of_version_4(folder)
    (folder / WEIGHTS).chmod(0o644)
    (folder / "run.json").unlink()


NEWER: dict[str, Callable[[Path], None]] = {
    "tokenizer_form": _json("tokenizer_config.json", tokenizer_class="TokenizersBackend"),
    "tokenizer_form: list": _json("tokenizer_config.json", extra_special_tokens=["<|im_end|>"]),
    "config_form": _json("config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "weights_form": _experts_in_one_tensor,
    "dtype_key": _json("config.json", torch_dtype=None, dtype="float32"),
}


@pytest.mark.parametrize("case", NEWER)
def test_a_form_that_a_reader_does_not_know_is_named(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _in_the_form_of_version_4(_copy(run, tmp_path / "model"))
    _json("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=None)(folder)
    older = ("--for", "transformers==4.51", "--no-generate")
    code, found = _results(folder, capsys, *older)
    assert (code, found["readers"]["state"], found["readers"]["holds_for"]) == (0, "pass", "every version")
    NEWER[case](folder)
    code, found = _results(folder, capsys, *older)
    state = "note" if case == "dtype_key" else "wrong"
    named = case.split(":")[0]
    assert (found["readers"]["name"], found["readers"]["state"]) == (named, state)
    assert {name for name, check in found.items() if check["state"] == "wrong"} <= {"readers"}
    assert code == (0 if state == "note" else 2)
    assert _results(folder, capsys, "--no-generate")[1]["readers"]["state"] == "note", "nobody named a version"
    code, found = _results(folder, capsys, "--for", "transformers==5.0", "--no-generate")
    assert (code, found["readers"]["state"]) == (0, "pass")


def test_the_output_says_for_whom_each_check_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["handoff", str(run), "--for", "transformers==4.51", "--no-generate"])
    printed = capsys.readouterr().out
    assert "For transformers==4.51: form, files, weights, base, dtype, readers." in printed
    assert "which is installed: config, names, tokenizer, template, stops, generation." in printed
    assert main(["handoff", str(run), "--for", "vllm==0.8"]) == 2
    assert "--for names no version of transformers" in capsys.readouterr().err


def test_an_adapter_alone_is_named_by_what_is_wrong_with_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.parent / "base", tmp_path / "base")
    folder = save_tiny_adapter(tmp_path / "base")
    assert _results(folder, capsys)[1]["form"]["name"] == "adapter_without_tokenizer"
    shutil.copy(tmp_path / "base" / "tokenizer_config.json", folder)
    code, found = _results(folder, capsys)
    assert (code, found["form"]["name"]) == (2, "adapter_only")
    _json("adapter_config.json", base_model_name_or_path="../base")(folder)
    assert _results(folder, capsys)[1]["form"]["name"] == "adapter_base_unknown"


def test_a_dtype_that_is_not_stated_is_a_note(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _copy(run, tmp_path / "model")
    _json("config.json", dtype=None)(folder)
    code, found = _results(folder, capsys, "--no-generate")
    assert (code, found["dtype"]["name"]) == (0, "dtype_not_stated")


def test_what_rl_must_be_told_is_a_note(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A system prompt that training gave by an argument of the template."""
    folder = _copy(run, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ greeting | default('') }}" + template)
    base = tmp_path / "base"
    shutil.copytree(run.parent / "base", base)
    shutil.copy(folder / "chat_template.jinja", base)
    config = (folder / "config.yaml").read_text().replace(str(run.parent / "base"), str(base))
    (folder / "config.yaml").write_text(config)
    code, found = _results(folder, capsys, "data.apply_chat_template_kwargs.greeting=hello")
    assert code == 0
    assert (found["template"]["state"], found["template"]["name"]) == ("note", "template_kwargs")


def test_a_tokenizer_whose_end_token_is_another_is_a_note(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(run, tmp_path / "model")
    _json("generation_config.json", eos_token_id=[2, 0])(folder)
    _json("tokenizer_config.json", eos_token="<|endoftext|>")(folder)
    code, found = _results(folder, capsys)
    assert (code, found["stops"]["name"]) == (0, "eos_is_not_the_stop")


def test_a_folder_of_no_run_is_compared_on_data_that_is_given(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(run, tmp_path / "model")
    for name in FACTS:
        (folder / name).unlink()
    code, found = _results(folder, capsys)
    assert code == 0
    assert "no training data" in found["template"]["what"]
    code, found = _results(folder, capsys, "--data", str(run.parent / "train.parquet"))
    assert found["template"]["what"].startswith("16 prompts")
    assert main(["handoff", str(folder), "--data", str(run.parent / "train.parquet"), "data.prompt_key=no"]) == 2
    assert "has no column 'no'" in capsys.readouterr().err


def test_every_name_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "handoff.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    sources = "".join(path.read_text() for path in (ROOT / "apollo_sft" / "tools" / "handoff").glob("*.py"))
    raised = set(re.findall(r'WrongError\(\s*"(\w+)"', sources))
    raised |= {name.split(":")[0] for name in (*NEWER, *BROKEN)}
    assert listed == raised


def test_the_table_says_what_to_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _copy(run, tmp_path / "model")
    _without("chat_template.jinja")(folder)
    assert main(["handoff", str(folder)]) == 2
    printed = capsys.readouterr().out
    assert "missing_template: export again" in printed
    assert "RL cannot start from this folder as it is." in printed
    assert main(["handoff", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
