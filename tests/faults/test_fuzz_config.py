"""Configurations that users really get wrong: misspelt, in another unit, negative, contradictory, or YAML's own traps.

`tests/unit/config/test_mutations.py` types at random; here every line is wrong on purpose and must be refused.
"""

import random
import time
from collections.abc import Callable, Iterator

import pytest

from apollo_sft.config.compose import compose, known_keys, validate
from apollo_sft.config.compose import recorded as as_tree
from apollo_sft.errors import ConfigError
from tests.support.reliability import record

GOOD = ["data.train_files=a.parquet", "data.val_files=null"]
SLOWEST_SECONDS = 10
COUNTS = [
    "data.train_batch_size", "data.micro_batch_size_per_gpu", "data.max_length", "trainer.total_epochs",
    "trainer.log_freq", "trainer.max_ckpt_to_keep", "trainer.nnodes", "ulysses_sequence_parallel_size",
    "model.lora_alpha",
]  # fmt: skip
SHARES = ["optim.warmup_steps_ratio", "optim.min_lr_ratio", "optim.stable_ratio", "model.lora_dropout"]
SWITCHES = [
    "data.multiturn.enable",
    "data.drop_last",
    "model.trust_remote_code",
    "model.use_rslora",
    "use_remove_padding",
]
CONTRADICTIONS = [
    ["optim.lr_warmup_steps=5", "optim.warmup_steps_ratio=0.1"],
    ["data.train_batch_size=4", "data.micro_batch_size_per_gpu=8"],
    ["data.micro_batch_size=2", "data.micro_batch_size_per_gpu=4"],
    ["data.use_dynamic_bsz=true"],
    ["data.max_token_len_per_gpu=100"],
    ["data.multiturn.messages_key=messages"],
    ["data.multiturn.enable=true", "data.prompt_key=a"],
    ["data.custom_cls.name=Mine"],
    ["trainer.export=adapter"],
    ["model.lora_rank=4", "model.target_modules=[]"],
    ["trainer.device=cpu", "model.attn_implementation=flash"],
    ["model.fsdp_config.model_dtype=fp64", "model.fsdp_config.dtype=bf16"],
    ["trainer.logger=[console,console]"],
    ["optim.betas=[0.9]"],
    ["optim.betas=[0.9,0.95,0.99]"],
]
YAML_TRAPS = [
    "optim.lr='1e-5'", "optim.lr=1e-5x", "optim.lr=.nan", "optim.lr=nan", "optim.lr=inf", "optim.lr=-inf",
    "data.max_length=1_000.5", "data.max_length=2k", "data.max_length=1e3", "data.max_length='1024'",
    "data.train_batch_size=08x", "data.train_batch_size=1:30", "trainer.seed=0.5", "trainer.total_epochs=null",
    "data.multiturn.enable=maybe", "data.multiturn.enable='true'", "model.trust_remote_code=1", "trainer.seed=true",
    "model.lora_rank=[8]", "optim.lr=", "data.apply_chat_template_kwargs=[a]", "optim={lr: fast}", "optim=1",
    "trainer.save_freq=30 minutes", "trainer.save_freq=0", "trainer.save_freq=0min", "trainer.save_freq=1.5",
    "trainer.resume_mode=yes", "model.strategy=ddp", "trainer.export_dtype=int8", "data.truncation=middle",
]  # fmt: skip


def misspelt(chance: random.Random) -> list[str]:
    key = chance.choice([key for key in known_keys() if "." in key and not key.endswith("kwargs")])
    section, _, name = key.rpartition(".")
    at = chance.randrange(1, len(name))
    change = chance.choice(["swap", "drop", "double", "case", "section"])
    if change == "swap":
        name = name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]
    elif change == "drop":
        name = name[:at] + name[at + 1 :]
    elif change == "double":
        name = name[:at] + name[at - 1] + name[at:]
    elif change == "case":
        name = name.upper()
    else:
        section = chance.choice(["training", "train", "dataa", "models"])
    wrong = f"{section}.{name}"
    return [f"{wrong}=1"] if wrong not in known_keys() else ["trainer.no_such_key=1"]


def wrong_unit(chance: random.Random) -> list[str]:
    unit = chance.choice(["GB", "s", "%", "k", "M", " tokens", "e-3", ".5"])
    return [f"{chance.choice(COUNTS)}={chance.randint(1, 99)}{unit}"]


def out_of_range(chance: random.Random) -> list[str]:
    if chance.random() < 0.5:
        return [f"{chance.choice(COUNTS)}={chance.choice([0, -1, -5, -(10**12)])}"]
    return [f"{chance.choice(SHARES)}={chance.choice([-0.1, 1.5, 10, 50])}"]


def not_a_switch(chance: random.Random) -> list[str]:
    return [f"{chance.choice(SWITCHES)}={chance.choice(['2', 'maybe', '[true]', 'None_', '0.0'])}"]


KINDS: list[Callable[[random.Random], list[str]]] = [
    misspelt,
    wrong_unit,
    out_of_range,
    not_a_switch,
    lambda chance: chance.choice(CONTRADICTIONS),
    lambda chance: [chance.choice(YAML_TRAPS)],
]


def lines(number: int, seed: int) -> Iterator[list[str]]:
    """All fixed ones in turn, then drawn ones."""
    chance = random.Random(seed)
    yield from CONTRADICTIONS
    yield from ([trap] for trap in YAML_TRAPS)
    for _ in range(number):
        yield chance.choice(KINDS)(chance)


def refuse_all(number: int, seed: int) -> None:
    failures, slowest, trials = [], 0.0, 0
    for wrong in lines(number, seed):
        trials += 1
        begun = time.monotonic()
        try:
            compose([*GOOD, *wrong])
            failures.append(f"{wrong} was accepted")
        except ConfigError as error:
            name = wrong[0].partition("=")[0].rpartition(".")[2]
            if error.exit_code != 2 or name.lower() not in str(error).lower():
                failures.append(f"{wrong}: {error}")
        except Exception as error:
            failures.append(f"{wrong}: {type(error).__name__}: {error}")
        slowest = max(slowest, time.monotonic() - begun)
    record("fuzzed configurations", trials=trials, failures=len(failures), worst_seconds=slowest)
    assert failures == []
    assert slowest < SLOWEST_SECONDS


def test_wrong_on_purpose() -> None:
    refuse_all(60, seed=0)


@pytest.mark.long
def test_wrong_on_purpose_at_length() -> None:
    refuse_all(3000, seed=1)


def test_the_good_line_is_accepted() -> None:
    assert validate(as_tree(compose(GOOD).config)).data.val_files == ()
