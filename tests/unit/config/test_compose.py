from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from apollo_sft.config.compose import YAML_PATH, Composed, compose, to_yaml, validate
from apollo_sft.errors import ConfigError

NO_VALIDATION = "data.val_files=null"


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(arguments)
    return str(caught.value)


def value(composed: Composed, key: str) -> Any:
    found: Any = composed.config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["+data.response_dict_keys=['answer']"], "data.response_dict_keys", ("answer",)),
        (["data.prompt_dict_keys=[question]"], "data.prompt_dict_keys", ("question",)),
        (["data.prompt_dict_keys=['question']"], "data.prompt_dict_keys", ("question",)),
        (["data.prompt_dict_keys=null"], "data.prompt_dict_keys", ()),
        (["trainer.logger=['console','wandb']"], "trainer.logger", ("console", "wandb")),
        (["trainer.logger=console"], "trainer.logger", ("console",)),
        (["optim.lr=1"], "optim.lr", 1.0),
        (["++optim.lr=1e-4"], "optim.lr", 1e-4),
        (["optim.clip_grad=null"], "optim.clip_grad", None),
        (["use_remove_padding=True"], "use_remove_padding", True),
        (["data.multiturn={enable: true}"], "data.multiturn.enable", True),
        (["data.max_length=${data.train_batch_size}"], "data.max_length", 256),
        (["trainer.experiment_name='1'"], "trainer.experiment_name", "1"),
        (["optim.optimizer=AdamW"], "optim.name", "adamw"),
        (['trainer.logger=["console"]'], "trainer.logger", ("console",)),
        (["model.fsdp_config.dtype=bfloat16"], "model.fsdp_config.dtype", "bf16"),
        (["data.val_files=[]"], "data.val_files", ()),
        (["data.chat_template=null"], "data.chat_template", None),
        (["trainer.experiment_name=my run (v2), lr=3"], "trainer.experiment_name", "my run (v2), lr=3"),
        (["data.prompt_key=질문 1"], "data.prompt_key", "질문 1"),
        (
            ["data.apply_chat_template_kwargs={enable_thinking: false}"],
            "data.apply_chat_template_kwargs",
            {"enable_thinking": False},
        ),
        (
            ["data.apply_chat_template_kwargs.enable_thinking=false"],
            "data.apply_chat_template_kwargs",
            {"enable_thinking": False},
        ),
    ],
)
def test_values_as_people_write_them(arguments: list[str], key: str, expected: object) -> None:
    found = value(compose(arguments), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("~/x.parquet", ("{home}/x.parquet",)),
        ("$HOME/x.parquet", ("{home}/x.parquet",)),
        ("${HOME}/x.parquet", ("{home}/x.parquet",)),
        ("[~/a.parquet,~/b.parquet]", ("{home}/a.parquet", "{home}/b.parquet")),
        ("['a,b.parquet', ~/c (1).parquet ]", ("a,b.parquet", "{home}/c (1).parquet")),
        ("[a.parquet,b.parquet]", ("a.parquet", "b.parquet")),
        ("/a/b=c.parquet", ("/a/b=c.parquet",)),
        ("x(1).parquet", ("x(1).parquet",)),
        ("it's.parquet", ("it's.parquet",)),
        ("'it\\'s.parquet'", ("it's.parquet",)),
        ('"a b.parquet"', ("a b.parquet",)),
        ("a\\b.parquet", ("a\\b.parquet",)),
        ("'a\\b.parquet'", ("a\\b.parquet",)),
        ("['~/a b.parquet', \"c's.parquet\"]", ("{home}/a b.parquet", "c's.parquet")),
        ("x{1}.parquet", ("x{{1}}.parquet",)),
        ("数据/训练.parquet", ("数据/训练.parquet",)),
        ("s3://b/x.parquet?v=1&w=2", ("s3://b/x.parquet?v=1&w=2",)),
        ("/a/${data.prompt_key}.parquet", ("/a/question.parquet",)),
        ("back\\", ("back\\",)),
        ("a b.parquet", ("a b.parquet",)),
        ("über/#1.parquet", ("über/#1.parquet",)),
        ("data/*.parquet", ("data/*.parquet",)),
    ],
)
def test_paths(written: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    config = compose([f"data.train_files={written}", NO_VALIDATION]).config
    assert config.data.train_files == tuple(path.format(home="/home/ann") for path in expected)


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ messages[0]['content'] }}, and\n'more'",
        "<s>{% for m in messages %}[{{ m.role }}]\\n{% endfor %}",
    ],
)
def test_jinja_text_needs_no_quotes(text: str) -> None:
    assert compose([f"data.chat_template={text}"]).config.data.chat_template == text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data.max_lenght=3"], ["unknown key data.max_lenght", "data.max_length?"]),
        (["max_length=3"], ["unknown key max_length", "data.max_length?"]),
        (["lr=3"], ["optim.lr?"]),
        (["data.multiturn={mesages_key: x}"], ["data.multiturn.mesages_key", "data.multiturn.messages_key?"]),
        (["data.max_length=abc"], ["data.max_length", "'abc'", "a whole number"]),
        (["data.max_length=1e3"], ["data.max_length", "1000.0"]),
        (["data.max_length=true"], ["data.max_length", "True"]),
        (["data.max_length=${nope}"], ["data.max_length", "nope"]),
        (["data.drop_last=yes"], ["data.drop_last", "true or false"]),
        (["optim.lr='1e-4'"], ["optim.lr", "number"]),
        (["optim.lr=inf"], ["optim.lr", "finite"]),
        (["optim.lr=0"], ["optim.lr", "greater than 0"]),
        (["optim.betas=[0.9]"], ["optim.betas", "a list of 2"]),
        (["optim.betas=[0.9,1.0]"], ["optim.betas", "less than 1"]),
        (["trainer.total_training_steps=0"], ["trainer.total_training_steps"]),
        (["data.truncation=middle"], ["data.truncation", "'error', 'left', 'right' or 'drop'"]),
        (["data=3"], ["data", "a dict"]),
        (["data.train_files=", NO_VALIDATION], ["data.train_files", "not empty"]),
        (["trainer.experiment_name=1"], ["trainer.experiment_name", "quote"]),
        (["trainer.save_freq=often"], ["trainer.save_freq", "30min"]),
        (["data.train_max_samples=0"], ["data.train_max_samples", "-1, or 1 and more"]),
        (["model.fsdp_config.fsdp_size=0"], ["model.fsdp_config.fsdp_size", "-1, or 1 and more"]),
        (["+optim.lr=1e-4"], ["+optim.lr", "write optim.lr=1e-4 without the +"]),
        (["~optim.lr"], ["~optim.lr", "deleted", "leave it out"]),
        (["optim.lr=1e-4,1e-5"], ["optim.lr has several values", "[a,b]"]),
        (["data.train_files=[a.parquet,b.parquet"], ["cannot be read", "[a.parquet,b.parquet"]),
        (["data.train_files='a.parquet"], ["cannot be read"]),
        (["--verbose"], ["unknown option --verbose", "key=value"]),
        (["--nproc=2"], ["unknown option --nproc=2", "apollo-sft train --nproc N"]),
        (["=3"], ["no key"]),
        (["optim.lr"], ["'optim.lr' cannot be read", "no =", "without spaces"]),
        (["optim.lr =1"], ["the key 'optim.lr '", "without spaces"]),
        (["data..max_length=1"], ["the key 'data..max_length'"]),
        (["DATA.MAX_LENGTH=8"], ["did you mean data.max_length?"]),
        (["data.train_files=a.parquet,b.parquet", NO_VALIDATION], ["has several values", "[a,b]"]),
        (["optim.lr=choice(1,2)"], ["optim.lr has several values"]),
        (["optim.lr=range(1,2)"], ["optim.lr has several values"]),
        (["~data"], ["~data: a key cannot be deleted"]),
        (["~trainer.logger=[console]"], ["a key cannot be deleted"]),
        (["data.train_files=${NO_SUCH_VARIABLE}/x", NO_VALIDATION], ["'NO_SUCH_VARIABLE' not found"]),
        (["trainer.save_freq=true"], ["trainer.save_freq", "True", "30min"]),
        (["trainer.total_epochs=2.0"], ["trainer.total_epochs", "a whole number"]),
        (["use_remove_padding=1"], ["use_remove_padding", "true or false"]),
        (["model.lora_alpha=0.5"], ["model.lora_alpha", "a whole number"]),
        (["optim.betas=0.9"], ["optim.betas", "a list"]),
        (["optim.betas=[0.9,0.95,0.99]"], ["optim.betas", "[0.9, 0.95, 0.99]", "a list of 2"]),
        (["data.custom_cls=null"], ["data.custom_cls", "data.custom_cls.…=value"]),
        (["model.partial_pretrain=null"], ["model.partial_pretrain", "a text"]),
        (["trainer.seed=99999999999999999999"], ["trainer.seed", "less than"]),
        (["optim.lr=nan"], ["optim.lr", "finite"]),
        (["model.strategy=ddp"], ["model.strategy", "'fsdp2' or 'fsdp'"]),
        (["optim@x=1"], ["cannot be read"]),
    ],
)
def test_mistakes_are_named(arguments: list[str], parts: list[str]) -> None:
    message = refused(*arguments)
    assert all(part in message for part in parts), message


def test_all_problems_come_in_one_message() -> None:
    message = refused("data.max_lenght=3", "optim.lr=-1", "+optim.betas=3", "trainer.sed=1", "model.lora_rank=x", "--q")
    for key in ("data.max_lenght", "optim.lr", "optim.betas", "trainer.sed", "model.lora_rank", "--q"):
        assert key in message
    assert message.count("trainer.sed ") + message.count("trainer.sed\n") == 1


def test_a_misspelt_key_hides_no_wrong_value_and_invents_no_contradiction() -> None:
    message = refused("data.train_files=a.parquet", "data.val_file=b.parquet")
    assert "unknown key data.val_file" in message
    assert "still the default" not in message


def test_a_repeated_key_counts_with_its_last_value_and_is_noted() -> None:
    """As in Hydra: a script whose line ends with "$@" is overridden by its arguments."""
    composed = compose(["optim.lr=1e-4", "data.max_length=8", "++optim.lr=2e-4"])
    assert composed.config.optim.lr == 2e-4
    assert composed.overridden == {"optim.lr": 2e-4, "data.max_length": 8}
    assert composed.notes == ["optim.lr is given twice, 0.0001 and then 0.0002: the last one counts"]
    assert compose(["data.prompt_dict_keys=[question]", "data.prompt_dict_keys=['question']"]).notes == []


def test_a_section_as_a_dict_sets_its_keys() -> None:
    composed = compose(["optim={lr: 1e-4, clip_grad: null}", "data.multiturn={enable: true}"])
    assert composed.overridden == {"optim.lr": 1e-4, "optim.clip_grad": None, "data.multiturn.enable": True}
    assert "data.val_files is still the default" in refused("data={train_files: a.parquet}")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["optim.lr=1e-4", "data.max_length=${data.train_batch_size}", "++optim.lr=2e-4"],
        ["optim={lr: 1e-4, betas: [0.8, 0.9]}", "+data.multiturn={enable: true}", "trainer.project_name='a,\\'b'"],
        ["++data.apply_chat_template_kwargs.a={b: [1, null]}", "++data.apply_chat_template_kwargs.a.c=${oc.env:HOME}"],
        ["++data.apply_chat_template_kwargs={a: {b: 1}}", "++data.apply_chat_template_kwargs={a: {c: 2}}"],
        ["+data.train_files=[a.parquet]", "trainer.experiment_name=${now:%Y}", "model.lora_alpha=int(3.2)"],
    ],
)
def test_it_is_hydras_own_composition(arguments: list[str]) -> None:
    arguments = ["data.train_files=a.parquet", "data.val_files=null", *arguments]
    OmegaConf.clear_resolver("now")  # a composition before this one has registered it
    ours = compose(arguments).config
    with hydra.initialize_config_dir(str(YAML_PATH.parent), version_base="1.3"):
        theirs = hydra.compose(YAML_PATH.stem, overrides=arguments)
    assert ours == validate(OmegaConf.to_container(theirs, resolve=True))


def test_a_section_is_not_added_to_with_a_single_value() -> None:
    assert "An item is already at 'optim'" in refused("+optim=3")


def test_a_composition_does_not_change_the_next_one() -> None:
    before = compose([]).config
    compose(["optim.lr=1e-4", "data.multiturn={enable: true}", "data.apply_chat_template_kwargs.a=1"])
    assert compose([]).config == before


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose(["data.max_length=8"])
    refused("data.max_lenght=8")
    assert list(tmp_path.iterdir()) == []
    assert not GlobalHydra.instance().is_initialized()


def test_overridden_names_what_was_set() -> None:
    composed = compose(["data.micro_batch_size=2", "optim.lr=1e-4"])
    assert composed.overridden == {"data.micro_batch_size_per_gpu": 2, "optim.lr": 1e-4}


def test_the_config_cannot_be_changed_and_comes_back_from_its_yaml(tmp_path: Path) -> None:
    config = compose(["data.max_length=8", "data.train_files=[a b.parquet]", NO_VALIDATION]).config
    with pytest.raises(ValueError, match="frozen"):
        config.data.max_length = 9  # type: ignore[misc]
    text = to_yaml(config)
    assert "max_length: 8" in text
    assert "- a b.parquet" in text
