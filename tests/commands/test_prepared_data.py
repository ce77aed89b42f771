"""What `apollo-sft prepare` wrote: training reads it, and real data and real chat templates agree with it."""

import json
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from apollo_sft.cli.main import main
from apollo_sft.prepare.demo_model import write_base_model
from tests.commands.test_documented import ROOT, run
from tests.support.models import tiny_config
from tests.support.sources import read, write_sources

SHARED = ROOT.parent / "shared"
GSM8K = SHARED / "data" / "gsm8k"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def model(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    texts = [(sources / name / "train.jsonl").read_text() for name in ("gsm8k", "tool")]
    write_base_model(folder, texts, seed=1)
    return folder


@pytest.mark.parametrize(("dataset", "starts"), [("gsm8k", "torchrun "), ("sft-tool", "apollo-sft train ")])
def test_the_printed_command_trains(dataset: str, starts: str, sources: Path, model: Path, tmp_path: Path) -> None:
    source = sources / dataset.removeprefix("sft-")
    out = ["--local_save_dir", "prepared"]
    prepared = run(["apollo-sft", "prepare", dataset, "--local_dataset_path", str(source), *out], tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    commands = [line for line in prepared.stdout.replace("\\\n", " ").splitlines() if line.startswith(starts)]
    (words,) = [shlex.split(command) for command in commands]
    at = next(i for i, word in enumerate(words) if word.startswith("model.partial_pretrain="))
    words[at] = f"model.partial_pretrain={model}"
    small = ["data.train_batch_size=8", "trainer.device=cpu", "trainer.total_training_steps=1"]
    finished = run([*words, *small], tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "sft-model" / "model.safetensors").is_file()


@pytest.mark.shared
@shared
@pytest.mark.parametrize("layout", ["single_turn", "messages"])
def test_gsm8k_as_it_was_prepared_elsewhere(layout: str, tmp_path: Path) -> None:
    options = ["--local_dataset_path", str(GSM8K), "--subset", layout, "--local_dir", str(tmp_path)]
    assert main(["prepare", "gsm8k", *options]) == 0
    for split, count in (("train", 7473), ("test", 1319)):
        made, theirs = read(tmp_path / f"{split}.parquet"), read(GSM8K / "single_turn" / f"{split}.parquet")
        assert len(made) == count
        for row, other in zip(made, theirs, strict=True):
            assert row["question"].split() == other["prompt"].split()
            assert row["answer"] == other["response"].strip()
            assert row["reward_model"] == other["reward_model"]


@pytest.fixture(scope="module")
def bases(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders without weights, which inspect does not need: one with the tokenizer of a family, one small."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizers = {"qwen3": SHARED / "tokenizers" / "qwen3", "small": model}
    for name, source in tokenizers.items():
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.save_pretrained(folder / name)
        tiny_config(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder / name)
    return {name: folder / name for name in tokenizers}


@pytest.mark.shared
@shared
@pytest.mark.parametrize(
    ("template", "code_as", "writes_code"),
    [
        ("qwen2_5", "calls", True),
        ("qwen3", "calls", True),
        ("glm4moe", "calls", True),
        ("mistral_nemo", "calls", True),
        ("granite3_3", "calls", False),
        ("smollm3", "calls", False),
        ("granite3_3", "text", True),
        ("smollm3", "text", True),
        ("qwen2_5", "text", True),
    ],
)
def test_what_a_tool_printed_is_never_a_target(
    template: str, code_as: str, writes_code: bool, sources: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    """`writes_code`: whether the template shows a call at all; docs/data_preparation.md lists those that do not."""
    out = ["--local_save_dir", str(tmp_path / "prepared"), "--code_as", code_as]
    assert main(["prepare", "sft-tool", "--local_dataset_path", str(sources / "tool"), *out]) == 0
    keys = {
        "data.train_files": tmp_path / "prepared" / "test.parquet",
        "data.val_files": "null",
        "data.multiturn.enable": "true",
        "data.train_batch_size": 4,
        "data.max_length": 2048,
        "data.chat_template": SHARED / "templates" / f"{template}.jinja",
        "data.store_dir": tmp_path / "store",
        "model.partial_pretrain": bases.get(template, bases["small"]),
        "model.add_special_tokens": "true",  # those of the other families' templates
    }
    code = main(["inspect", *(f"{key}={value}" for key, value in keys.items()), "--dump", str(tmp_path / "dump.jsonl")])
    assert code == 0
    targets = [json.loads(line)["targets"] for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    joined = ["".join(texts) for texts in targets]
    assert len(joined) >= 20 and not any("PRINTED" in text for text in joined)
    assert any("The answer is" in text for text in joined)
    assert any("print(300 + 1)" in text for text in joined) == writes_code
