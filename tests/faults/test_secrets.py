"""Secrets stay where they were given: none is in a file of the run or in what it says. And no run calls home."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apollo_sft.errors import ConfigError
from apollo_sft.redact import redact
from tests.support import python
from tests.support.runs import arguments, write_inputs

OF_THE_ENVIRONMENT = {
    "HF_TOKEN": "canary-of-the-hub-0001",
    "AWS_SECRET_ACCESS_KEY": "canary/of+aws/0002",
    "MY_API_KEY": "canary-of-mine-0003",
    "WANDB_API_KEY": "c0ffee" * 6 + "0004",
}
IN_A_URL, SIGNED, NAMED = "canary-of-a-url-0005", "canary-of-a-signature-0006", "canary-of-an-argument-0007"
HUB = "hf_canaryOfTheHub00080008"
CANARIES = (*OF_THE_ENVIRONMENT.values(), IN_A_URL, SIGNED, NAMED, HUB)
SAFE = ("trainer.total_training_steps=2", "trainer.save_freq=1", "trainer.checkpoint.async_save=false")
WATCH = """
import os, sys
FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"}
def watch(event, arguments):
    if event in FORBIDDEN and "AF_UNIX" not in str(arguments):
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{event} {arguments}\\n")
sys.addaudithook(watch)
from apollo_sft.__main__ import run
run()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(command: list[str], **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
    return python.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


def found_in(folder: Path, text: str) -> list[str]:
    shown = [f"{path}: {canary}" for path in folder.rglob("*") if path.is_file() for canary in CANARIES
             if canary.encode() in path.read_bytes()]  # fmt: skip
    return shown + [f"console: {canary}" for canary in CANARIES if canary in text]


def secret_arguments(inputs: Path, out: Path) -> list[str]:
    return arguments(
        inputs,
        out,
        *SAFE,
        f"trainer.experiment_name={HUB}",
        f"data.apply_chat_template_kwargs={{api_key: {NAMED}, "
        f"url: 'https://me:{IN_A_URL}@host/x?X-Amz-Signature={SIGNED}&a=1'}}",
        "trainer.logger=[console,wandb,tensorboard]",
    )


def test_no_secret_is_written_or_said(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "apollo_sft", *secret_arguments(inputs, out)]
    finished = run(command, WANDB_MODE="offline", **OF_THE_ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert found_in(out, finished.stdout + finished.stderr) == []
    assert "https://***@host/x" in (out / "config.yaml").read_text()
    kept = yaml.safe_load((out / "config.yaml").read_text())["data"]["apply_chat_template_kwargs"]
    assert kept == {"api_key": "***", "url": "https://***@host/x?X-Amz-Signature=***&a=1"}
    assert list(out.glob("wandb/offline-run-*/run-*.wandb")), "wandb took part"
    assert json.loads((out / "run.json").read_text())["overridden"]["trainer.experiment_name"] == "***"
    again = run(command, WANDB_MODE="offline", **OF_THE_ENVIRONMENT)
    assert "is complete" in again.stderr, "what was hidden makes no other configuration"
    assert found_in(out, again.stdout + again.stderr) == []


@pytest.mark.parametrize(
    "argument",
    [
        f"trainer.api_key={NAMED}",
        f"data.chat_template=./https://me:{IN_A_URL}@host/a.jinja",
        f"data.train_files=/nowhere/{HUB}.parquet",
        f"password={NAMED} x",
        f"model.partial_pretrain=./{OF_THE_ENVIRONMENT['MY_API_KEY']}",
    ],
)
def test_no_secret_is_in_a_refusal(argument: str, monkeypatch: pytest.MonkeyPatch, inputs: Path) -> None:
    from apollo_sft.cli.job import compose_job

    for name, value in OF_THE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    key = argument.partition("=")[0]
    others = [text for text in arguments(inputs, inputs / "out") if not text.startswith(f"{key}=")]
    with pytest.raises(ConfigError) as caught:
        compose_job([*others, argument])
    assert not [canary for canary in CANARIES if canary in str(caught.value)]


@pytest.mark.parametrize(
    "text",
    [
        "num_memory_tokens=12345678",
        "data.prompt_key=question",
        "model.lora_rank=8 max_tokens: 4096, tokenizer=fast",
        "the stop token: <|im_end|>",
        "https://host/a?page=2",
        "the secretary said",
        "TOKENIZERS_PARALLELISM=true",
    ],
)
def test_what_only_looks_like_a_secret_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "question")
    assert redact(text) == text
    assert redact({"num_memory_tokens": 5, "x": [text]}) == {"num_memory_tokens": 5, "x": [text]}


def test_a_run_opens_no_connection(inputs: Path, tmp_path: Path) -> None:
    """Without any variable that asks for it: a local model and local data need no network."""
    calls = tmp_path / "calls"
    command = [sys.executable, "-c", WATCH, *arguments(inputs, tmp_path / "out", *SAFE, "trainer.logger=[console]")]
    finished = run(command, CALLS=str(calls), HF_HUB_OFFLINE="0")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert not calls.exists() or calls.read_text() == ""


WITHOUT_NETWORK = """
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) == 0  # CLONE_NEWUSER and CLONE_NEWNET of linux/sched.h
from apollo_sft.__main__ import run
run()
"""
"""As `unshare -rn python -m apollo_sft`, in a process that is forked."""


def may_unshare() -> bool:
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="this system lets nobody take the network away")
def test_a_run_without_any_network(inputs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_NETWORK, *arguments(inputs, tmp_path / "out", *SAFE)]
    finished = run(command)
    assert finished.returncode == 0, finished.stderr[-3000:]
    hub = [text if not text.startswith("model.partial_pretrain") else "model.partial_pretrain=someone/not-there"
           for text in command]  # fmt: skip
    refused = run([text.replace("/out", "/other") for text in hub])
    assert refused.returncode == 2
    assert "could not be downloaded from the hub" in refused.stderr
