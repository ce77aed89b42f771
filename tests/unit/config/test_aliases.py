import pytest

from apollo_sft.config.aliases import REFUSED, REFUSED_SECTIONS, RENAMED, WITHOUT_EFFECT
from apollo_sft.config.compose import compose, known_keys
from apollo_sft.errors import ConfigError


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_another_spelling_sets_the_key_and_is_noted(prefix: str) -> None:
    composed = compose([f"{prefix}optim.lr_warmup_steps_ratio=0.2"])
    assert composed.config.optim.warmup_steps_ratio == 0.2
    assert composed.notes == ["optim.lr_warmup_steps_ratio is read as optim.warmup_steps_ratio"]


def test_two_spellings_may_agree_but_not_differ() -> None:
    same = compose(["data.micro_batch_size=8", "data.micro_batch_size_per_gpu=8"]).config
    assert same.data.micro_batch_size_per_gpu == 8
    with pytest.raises(ConfigError) as caught:
        compose(["data.micro_batch_size=4", "data.micro_batch_size_per_gpu=8"])
    message = str(caught.value)
    assert "data.micro_batch_size and data.micro_batch_size_per_gpu mean the same, but differ" in message
    assert "4 and 8" in message


@pytest.mark.parametrize("old", RENAMED)
def test_every_other_spelling_reaches_its_key(old: str) -> None:
    written = {
        "data.micro_batch_size": "2",
        "optim.lr_warmup_steps_ratio": "0.2",
        "optim.optimizer": "adamw",
        "optim.lr_scheduler_type": "wsd",
        "model.use_remove_padding": "true",
        "trainer.n_gpus": "2",
    }.get(old, "other")
    beside = ["data.multiturn.enable=true"] if "multiturn" in RENAMED[old] else []
    renamed, direct = compose([f"{old}={written}", *beside]), compose([f"{RENAMED[old]}={written}", *beside])
    assert renamed.config == direct.config
    assert renamed.overridden == direct.overridden
    assert renamed.notes == [f"{old} is read as {RENAMED[old]}", *direct.notes]


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_keys_without_effect_are_accepted_and_said(key: str) -> None:
    composed = compose([f"{key}=true"])
    assert composed.config == compose([]).config
    assert composed.notes == [f"{key} has no effect: {WITHOUT_EFFECT[key]}"]


@pytest.mark.parametrize("key", [*REFUSED, *(f"{section}.anything" for section in REFUSED_SECTIONS)])
def test_keys_of_other_trainers_say_what_to_do(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"{key}=1"])
    assert f"{key} is not a key of this trainer" in str(caught.value)
    assert "to do:" in str(caught.value)


def test_the_tables_do_not_overlap_and_lead_to_known_keys() -> None:
    tables = [set(RENAMED), set(WITHOUT_EFFECT), set(REFUSED), set(known_keys())]
    assert sum(len(table) for table in tables) == len(set.union(*tables))
    assert set(RENAMED.values()) <= set(known_keys())
