"""The reference page's GSM8K command whole, two ranks that share every row, on a Qwen2-style model and real rows."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.commands.test_documented import PAGE_GSM8K, SMALL, Inputs, replaced, run
from tests.support.models import save_tiny_model, tiny_config
from tests.support.runs import read_metrics, series

SHARED = Path(__file__).resolve().parents[3] / "shared"
STEPS = 3

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """14 heads, 2 of keys, as Qwen2.5-0.5B; random weights, a tokenizer of 151,669 tokens."""
    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    config = tiny_config(
        vocab_size=151936,
        hidden_size=56,
        num_attention_heads=14,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
        pad_token_id=151643,
    )
    save_tiny_model(folder, config)
    tokenizer.save_pretrained(folder)
    data = SHARED / "data" / "gsm8k"
    return Inputs(folder, data / "single_turn", data / "messages")


def losses(command: str, inputs: Inputs, out: Path) -> list[float]:
    words = replaced(command, inputs, out)
    words = [
        word.replace(f"total_training_steps={SMALL['trainer.total_training_steps']}", f"total_training_steps={STEPS}")
        for word in words
    ]
    finished = run([*words, "data.train_max_samples=64", "data.val_max_samples=8"], out.parent)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert (out / "model.safetensors").is_file()
    metrics = read_metrics(out)
    return [*series(metrics, "train/loss"), *series(metrics, "val/loss")]


def test_sequence_ranks_train_what_one_rank_does(inputs: Inputs, tmp_path: Path) -> None:
    assert "ulysses_sequence_parallel_size=2" in PAGE_GSM8K and "use_remove_padding=true" in PAGE_GSM8K
    whole = losses(PAGE_GSM8K, inputs, tmp_path / "whole")
    alone = PAGE_GSM8K.replace("--nproc_per_node=2", "--nproc_per_node=1")
    alone = alone.replace("ulysses_sequence_parallel_size=2", "ulysses_sequence_parallel_size=1")
    assert len(whole) == STEPS + 1
    assert whole == pytest.approx(losses(alone, inputs, tmp_path / "alone"), rel=1e-5)
