from pathlib import Path

import pytest

from apollo_sft.config.checks import check_paths
from apollo_sft.config.compose import compose
from apollo_sft.errors import ConfigError

NO_VALIDATION = "data.val_files=null"
QLORA = ("model.load_in_4bit=true", "model.lora_rank=8")


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data.train_files=a.parquet"], ["data.val_files is still the default", "data.val_files=null"]),
        (["data.train_files=[]", NO_VALIDATION], ["data.train_files names no file"]),
        (["data.micro_batch_size_per_gpu=512"], ["larger than data.train_batch_size", "256 or less"]),
        (["data.max_token_len_per_gpu=8"], ["data.use_dynamic_bsz=true"]),
        (["data.use_dynamic_bsz=true"], ["needs data.max_token_len_per_gpu"]),
        (["optim.lr_warmup_steps=10", "optim.warmup_steps_ratio=0.1"], ["give one of them"]),
        (["optim.lr_warmup_steps=10", "optim.lr_warmup_steps_ratio=0.1"], ["give one of them"]),
        (
            ["model.fsdp_config.model_dtype=fp64", "model.fsdp_config.dtype=bf16"],
            ["dtype=bf16, model_dtype=fp64", "auto or fp64"],
        ),
        (["model.fsdp_config.model_dtype=bf16", "model.fsdp_config.dtype=fp32"], ["dtype=auto or bf16"]),
        (["model.fsdp_config.dtype=fp64"], ["dtype=fp64, model_dtype=fp32"]),
        (["data.multiturn.messages_key=chat"], ["data.multiturn.enable is false", "data.multiturn.enable=true"]),
        (["data.multiturn.enable=true", "data.prompt_key=q"], ["data.prompt_key", "data.multiturn.enable=true"]),
        (["data.custom_cls.name=Mine"], ["data.custom_cls.path and data.custom_cls.name go together"]),
        (["trainer.device=cpu", "model.attn_implementation=flash"], ["attn_implementation=flash needs CUDA"]),
        (["model.lora_rank=8", "model.target_modules=[]"], ["model.target_modules is empty"]),
        (["trainer.export=adapter"], ["trainer.export=adapter needs LoRA"]),
        (["model.load_in_4bit=true"], ["model.load_in_4bit=true needs LoRA", "model.lora_rank=16"]),
        ([*QLORA, "trainer.device=cpu"], ["model.load_in_4bit=true needs CUDA", "trainer.device=cpu"]),
        ([*QLORA, "model.strategy=fsdp"], ["model.load_in_4bit=true needs model.strategy=fsdp2"]),
        ([*QLORA, "model.fsdp_config.model_dtype=fp64"], ["model.load_in_4bit=true knows no float64"]),
        (["trainer.logger=[consoles]"], ["did you mean console?"]),
        (["trainer.logger=[console,console]"], ["names one twice"]),
        (["data.micro_batch_size=512", "trainer.logger=[consoles]"], ["larger than", "did you mean console?"]),
    ],
)
def test_impossible_combinations(arguments: list[str], parts: list[str]) -> None:
    message = refused(*arguments)
    assert all(part in message for part in parts), message


def test_lora_keys_go_together() -> None:
    arguments = ["model.lora_rank=8", "model.lora_alpha=32", "model.lora_dropout=0.1", "trainer.export=adapter"]
    assert compose(arguments).notes == []


@pytest.mark.parametrize("key", ["model.lora_rank=8", "model.lora_adapter_path=adapter"])
def test_adapters_may_lie_on_a_base_in_4_bits(key: str) -> None:
    assert compose([key, "model.load_in_4bit=true"]).config.model.load_in_4bit


def test_a_cap_by_tokens_frees_the_number_of_samples_in_a_forward() -> None:
    arguments = ["data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=8192", "data.train_batch_size=2"]
    assert compose(arguments).config.data.max_token_len_per_gpu == 8192


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("model.fsdp_config.model_dtype=bf16", "warning: model.fsdp_config.model_dtype=bf16"),
        ("use_remove_padding=true", "there never is padding"),
        ("optim.stable_ratio=0.5", "optim.stable_ratio has no effect without optim.lr_scheduler=wsd"),
        ("model.use_rslora=true", "model.use_rslora has no effect with model.lora_rank=0"),
        ("model.lora_alpha=32", "model.lora_alpha has no effect with model.lora_rank=0"),
    ],
)
def test_what_is_accepted_but_should_be_known_is_noted(argument: str, part: str) -> None:
    (note,) = compose([argument]).notes
    assert part in note
    assert compose([]).notes == []


def test_generations_without_validation_are_noted() -> None:
    (note,) = compose(["trainer.generate_samples=2", NO_VALIDATION]).notes
    assert note == "trainer.generate_samples has no effect without validation data"


def test_compiled_layers_show_no_operators_to_selective_checkpointing() -> None:
    checkpointing = ["model.enable_gradient_checkpointing=true", "model.gradient_checkpointing_policy=selective"]
    assert "model.compile=true" in refused("model.compile=true", *checkpointing)
    compose(["model.compile=true", checkpointing[0]])
    compose(checkpointing)


def test_weights_in_four_bits_are_not_compiled() -> None:
    assert "model.compile=false" in refused("model.compile=true", "model.load_in_4bit=true", "model.lora_rank=8")


def paths_refused(*arguments: str) -> str:
    composed = compose(arguments)
    with pytest.raises(ConfigError) as caught:
        check_paths(composed.config.data, composed.config.model, set(composed.overridden))
    return str(caught.value)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a training file and a model folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.parquet").touch()
    (tmp_path / "model").mkdir()
    return tmp_path


TRAIN = "data.train_files=~/train.parquet"
MODEL = "model.partial_pretrain=~/model"


@pytest.mark.parametrize(
    "arguments",
    [
        [TRAIN, NO_VALIDATION, MODEL],
        ["data.train_files=~/*.parquet", NO_VALIDATION, MODEL],
        ["data.train_files=~", "data.val_files=[~/train.parquet]", MODEL],
        ["data.train_files=hf://owner/set/x.parquet", NO_VALIDATION, "model.partial_pretrain=Qwen/Qwen2.5-0.5B"],
        [TRAIN, NO_VALIDATION, MODEL, "data.chat_template=chatml"],
        [TRAIN, NO_VALIDATION, MODEL, "data.chat_template=a/b/{{ messages }}"],
    ],
)
def test_paths_that_exist_or_are_not_local_pass(arguments: list[str], files: Path) -> None:
    composed = compose(arguments)
    check_paths(composed.config.data, composed.config.model, set(composed.overridden))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["data.train_files (its default): no such file", "data/gsm8k/train.parquet", "to do:"]),
        ([TRAIN, "data.val_files=~/no.parquet"], ["data.val_files: no such file", "data.val_files=null"]),
        (["data.train_files=[~/train.parquet,~/no.parquet]", NO_VALIDATION], ["no such file", "no.parquet"]),
        (["data.train_files=~/no/*.parquet", NO_VALIDATION], ["no such file", "no/*.parquet"]),
        ([TRAIN, NO_VALIDATION], ["model.partial_pretrain (its default): no such folder", "a hub id"]),
        ([TRAIN, NO_VALIDATION, "model.partial_pretrain=./no"], ["model.partial_pretrain: no such folder"]),
        ([TRAIN, NO_VALIDATION, MODEL, "data.chat_template=~/no.jinja"], ["data.chat_template: no such file"]),
        ([TRAIN, NO_VALIDATION, MODEL, "model.external_lib=no_such_lib"], ["model.external_lib", "no_such_lib"]),
        ([TRAIN, NO_VALIDATION, MODEL, "model.external_lib=.x"], ["model.external_lib cannot be found"]),
        (["data.train_files=~/a,~/b", NO_VALIDATION], ["a list is written data.train_files=[", "/a,~/b]"]),
        (["data.train_files=/" + "n" * 300, NO_VALIDATION, MODEL], ["data.train_files: no such file"]),
        (
            [],
            ["data.train_files (its default)", "data.val_files (its default)", "model.partial_pretrain (its default)"],
        ),
    ],
)
def test_missing_paths_are_named_by_key(arguments: list[str], parts: list[str], files: Path) -> None:
    message = paths_refused(*arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("compute", ["auto", "fp32", "bf16", "fp64"])
@pytest.mark.parametrize("master", ["fp32", "bf16", "fp64"])
def test_which_precisions_go_together(master: str, compute: str) -> None:
    arguments = [f"model.fsdp_config.model_dtype={master}", f"model.fsdp_config.dtype={compute}"]
    if (master, compute) in {("fp32", "fp64"), ("bf16", "fp32"), ("bf16", "fp64"), ("fp64", "fp32"), ("fp64", "bf16")}:
        assert f"dtype={compute}, model_dtype={master}" in refused(*arguments)
    else:
        fsdp = compose(arguments).config.model.fsdp_config
        assert (fsdp.model_dtype, fsdp.dtype) == (master, compute)


def test_a_default_validation_file_that_is_missing_can_be_switched_off(files: Path) -> None:
    default = files / "data" / "gsm8k"
    default.mkdir(parents=True)
    (default / "train.parquet").touch()
    message = paths_refused(MODEL)
    assert "data.val_files (its default): no such file" in message
    assert "data.val_files=null" in message
