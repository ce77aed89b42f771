import json
from pathlib import Path

from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.audit import describe, marked, to_json
from apollo_sft.data.store.open import SampleStore, StoreRequest, prepare_store
from tests.support.data import UNSTOPPED, chat, data_config, tiny_tokenizer, write_parquet


def store(tmp_path: Path, name: str, rows: list[dict[str, object]], **changes: object) -> SampleStore:
    tokenizer = tiny_tokenizer()
    data = data_config("messages" in rows[0], store_dir=str(tmp_path / "store"), **changes)
    file = write_parquet(tmp_path / name, rows)
    template = resolve_template(tokenizer, data)
    return prepare_store(StoreRequest("train", (file,), -1, tokenizer, template, data), lambda _: None)


def test_the_text_shows_counts_remarks_and_a_marked_example(tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}", "answer": "four"} for i in range(1000)]
    train = store(tmp_path, "a.parquet", rows)
    rows = [{"question": "long " * 30, "answer": "x" * 50}, {"question": "q", "answer": ""}]
    val = store(tmp_path, "b.parquet", rows, max_length=100, truncation="left")
    text = describe(train, val, tiny_tokenizer(), [("steps per epoch", "4")])
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["rows"] == ["rows", "1,000", "2"]
    assert lines["targets"][1] == f"{train.summary.num_targets:,}"
    assert lines["targets"][2] == f"({train.summary.num_targets / train.summary.num_tokens:.1%})"
    assert lines["steps per epoch"][-1] == "4"
    assert lines["stop tokens"][-1] == "<|im_end|>"
    assert f"longest of validation: {tmp_path / 'b.parquet'} row 0" in text
    assert "! validation: 1 rows over data.max_length" in text
    assert "1 samples truncated" in text
    assert "1 replies are empty" in text
    assert "! train" not in text
    assert text.endswith("<|im_start|>user\nwhat is 0<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧\n")


def test_every_target_is_marked_and_colour_adds_to_the_brackets(tmp_path: Path) -> None:
    sample = store(tmp_path, "a.parquet", [{"messages": chat("a", "é👩‍👧", "c", "d" * 5000)}], max_length=9999)[0]
    plain = marked(sample, tiny_tokenizer())
    assert plain.count("⟦") == plain.count("⟧") == 2
    assert "⟦é👩‍👧<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>" in plain
    assert "characters …" in plain
    coloured = marked(sample, tiny_tokenizer(), colour=True)
    assert "\033[32m⟦é👩‍👧<|im_end|>⟧\033[0m" in coloured


def test_replies_without_a_stop_token_are_remarked(tmp_path: Path) -> None:
    train = store(tmp_path, "a.parquet", [{"question": "q", "answer": "a"}], chat_template=UNSTOPPED)
    text = describe(train, None, tiny_tokenizer())
    assert "1 replies have no stop token" in text
    assert next(line for line in text.splitlines() if line.startswith("stop tokens")).split()[-1] == "none"


def test_the_json_form_has_the_same_figures(tmp_path: Path) -> None:
    train = store(tmp_path, "a.parquet", [{"question": "q", "answer": ""}] * 3)
    written = json.loads(json.dumps(to_json(train, None)))
    assert list(written) == ["train"]
    assert written["train"]["num_rows"] == 3
    assert written["train"]["num_targets"] == train.summary.num_targets
    assert written["train"]["remarks"] == ["3 replies are empty"]
