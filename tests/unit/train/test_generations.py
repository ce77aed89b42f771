"""Which prompts a run asks its model, where a text must end, and what becomes of the lines."""

import json
from pathlib import Path

import numpy as np
import pytest

from apollo_sft.config.compose import compose
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.report.sinks import RunInfo
from apollo_sft.train.generations import first_prompts, position_limit
from apollo_sft.train.reporter import Reporter
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample
from tests.support.data import tiny_tokenizer
from tests.support.models import tiny_config
from tests.support.samples import write_store


def conversation(row: int, *parts: tuple[str, bool]) -> Sample:
    """Texts, and whether they are trained."""
    tokenizer = tiny_tokenizer()
    ids, targets = [], []
    for text, is_target in parts:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        targets += [is_target] * len(found)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    for position in range(len(ids) - 1):
        if targets[position + 1]:
            labels[position] = ids[position + 1]
    return Sample(np.array(ids, dtype=np.int32), labels, RowRef("rows", row), (1,))


def store(folder: Path) -> SampleStore:
    """Row 0 gives two samples; row 1 begins with a target; row 2 is like others."""
    return write_store(
        folder,
        [
            conversation(0, ("one two", False), ("four", True), ("one", False), ("three<|im_end|>", True)),
            conversation(0, ("one two three", False), ("four", True)),
            conversation(1, ("one", False), ("<|im_end|>", True)),
            conversation(2, ("what is", False), ("the answer", True), ("one", False)),
        ],
    )


@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_the_first_reply_of_each_of_the_first_rows(number: int, tmp_path: Path) -> None:
    prompts = first_prompts(store(tmp_path), tiny_tokenizer(), number)
    expected = [("one two", "four", 0), ("one", "<|im_end|>", 1), ("what is", "the answer", 2)]
    assert [(p.text, p.expected, p.ref.row) for p in prompts] == expected[:number]
    for prompt in prompts:
        assert tiny_tokenizer().decode(prompt.ids) == prompt.text


def test_a_text_ends_where_the_positions_of_the_model_do() -> None:
    assert position_limit(tiny_config("GPT2", max_position_embeddings=64)) == 64
    long = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert position_limit(tiny_config("Phi3", rope_scaling=long, original_max_position_embeddings=32)) == 32
    assert position_limit(tiny_config("Qwen2")) == 256


def test_steps_that_are_done_again_say_it_once(tmp_path: Path) -> None:
    trainer = compose(["data.val_files=val.parquet", "trainer.generate_samples=1", "trainer.logger=[]"]).config.trainer
    for first_step, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        reporter = Reporter(trainer, RunInfo(tmp_path, "p", "e", {}, first_step), 8)
        for step in steps:
            reporter.replies(step, [{"row": "r", "prompt": "p", "expected": "e", "text": f"\u00e9 {first_step}"}])
        reporter.replies(9, [])
        reporter.close()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["text"]) for line in lines] == [(2, "é 0"), (4, "é 0"), (6, "é 4"), (8, "é 4")]
