"""`apollo-sft prepare` as a user types it: every documented command, what it writes, and that training reads it."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from apollo_sft.cli.main import main
from apollo_sft.model.generate import exact_match
from apollo_sft.prepare.records import BOXED_INSTRUCTION, GSM8K_INSTRUCTION
from tests.commands.test_documented import ROOT, documented, run
from tests.support.data import write_parquet
from tests.support.sources import chat_rows, gsm8k_rows, read, write_sources

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Main:
    """Runs the command in this process: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["prepare", *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


# What the documents show

PAGE = [
    "python3 -m examples.data_preprocess.gsm8k",
    "python3 -m examples.data_preprocess.prepare_informal_math --data_source DigitalLearningGmbH/MATH-lighteval",
    "python3 -m examples.data_preprocess.multiturn",
]
WRITTEN = {
    PAGE[0]: ("gsm8k", "gsm8k"),
    PAGE[1]: ("math", "DigitalLearningGmbH/MATH-lighteval"),
    PAGE[2]: (None, "multiturn"),
    "apollo-sft prepare gsm8k": ("gsm8k", "gsm8k"),
    "apollo-sft prepare informal-math --data_source DigitalLearningGmbH/MATH-lighteval": (
        "math",
        "DigitalLearningGmbH/MATH-lighteval",
    ),
    "apollo-sft prepare multiturn": (None, "multiturn"),
    "apollo-sft prepare sft-tool": ("tool", "AI-MO/NuminaMath-TIR"),
    "apollo-sft prepare sft-no-tool": ("gsm8k", "openai/gsm8k"),
}
"""Documented commands, what stands in for the hub, and the folder below ~/data that is written."""
CUSTOM = [
    "apollo-sft prepare custom --local_dataset_path chats.jsonl --splits train --dry_run",
    "apollo-sft prepare custom --local_dataset_path table.parquet --splits train --prompt_column q --response_column a",
]


def test_the_documents_show_these_commands() -> None:
    text = (ROOT / "docs" / "data_preparation.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    fenced = {" ".join(line.split()) for block in blocks for line in block.splitlines()}
    assert set(PAGE) <= fenced
    shown = {command for command in documented() if command.startswith("apollo-sft prepare ") and "…" not in command}
    assert shown == {command for command in [*WRITTEN, *CUSTOM] if command.startswith("apollo-sft")}


@pytest.mark.parametrize("command", WRITTEN)
def test_documented_commands_write_where_they_say(command: str, sources: Path, tmp_path: Path) -> None:
    stand_in, folder = WRITTEN[command]
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    local = [] if stand_in is None else ["--local_dataset_path", str(sources / stand_in)]
    finished = run([*shlex.split(command), *local], tmp_path)
    assert finished.returncode == 0, finished.stderr
    manifest = json.loads((tmp_path / "data" / folder / "manifest.json").read_text())
    for split in ("train", "test"):
        rows = pq.ParquetFile(tmp_path / "data" / folder / f"{split}.parquet").metadata.num_rows
        assert rows == manifest["splits"][split]["rows_out"] > 0


@pytest.mark.parametrize("command", CUSTOM)
def test_documented_commands_for_own_data(command: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in chat_rows(3, 0)), encoding="utf-8")
    write_parquet(tmp_path / "table.parquet", [{"q": "1 + 1?", "a": "2", "other": 3}])
    finished = run(shlex.split(command), tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "recognised: " in finished.stdout
    assert (tmp_path / "data").exists() == ("--dry_run" not in command)


# The same prompt in SFT and in RL


@pytest.mark.parametrize(
    ("dataset", "source", "ending"),
    [
        ("gsm8k", "gsm8k", f" {GSM8K_INSTRUCTION}"),
        ("informal-math", "math", f"\n{BOXED_INSTRUCTION}"),
        ("sft-no-tool", "gsm8k", f"\n{BOXED_INSTRUCTION}"),
    ],
)
def test_one_schema_and_one_prompt_for_both_stages(
    dataset: str, source: str, ending: str, sources: Path, tmp_path: Path, here: Main
) -> None:
    code, _, _ = here(dataset, "--local_dataset_path", sources / source, "--local_save_dir", tmp_path)
    assert code == 0
    for split, count in (("train", 300), ("test", 20)):
        rows = read(tmp_path / f"{split}.parquet")
        assert [row["extra_info"]["index"] for row in rows] == list(range(count))
        for row in rows:
            extra = row["extra_info"]
            (user,) = row["prompt"]
            assert user == {"role": "user", "content": row["question"]}
            assert extra["question"] == row["question"] == extra["raw_question"] + ending
            assert extra["answer"] == row["answer"] and extra["split"] == split
            assert row["reward_model"]["style"] == "rule"
            assert exact_match([row["answer"]], [row["reward_model"]["ground_truth"]]) == 1


def test_tool_conversations_ask_what_rl_asks(sources: Path, tmp_path: Path, here: Main) -> None:
    for dataset in ("sft-tool", "informal-math"):
        out = tmp_path / dataset
        assert here(dataset, "--local_dataset_path", sources / "tool", "--local_save_dir", out)[0] == 0
    rl, sft = (read(tmp_path / dataset / "train.parquet") for dataset in ("informal-math", "sft-tool"))
    assert [row["prompt"][0]["content"] for row in rl] == [row["messages"][0]["content"] for row in sft]
    assert [row["reward_model"]["ground_truth"] for row in rl] == [row["extra_info"]["ground_truth"] for row in sft]


def test_answers_get_the_box_that_the_prompt_asks_for(tmp_path: Path, here: Main) -> None:
    rows = [
        {"question": "a", "answer": "1 + 1 = 2\n#### 2"},
        {"question": "b", "answer": "33"},
        {"question": "c", "solution": "by hand", "final_answer": "4"},
        {"question": "d", "answer": "\\boxed{5}"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = [
        "--local_dataset_path",
        tmp_path / "rows.jsonl",
        "--splits",
        "train",
        "--local_save_dir",
        tmp_path / "out",
    ]
    code, out, _ = here("informal-math", *options)
    assert code == 0 and "3 answers had no \\boxed{}" in out
    answers = [row["answer"] for row in read(tmp_path / "out" / "train.parquet")]
    assert answers == ["1 + 1 = 2\n\\boxed{2}", "\\boxed{33}", "by hand\n\\boxed{4}", "\\boxed{5}"]
    assert here("informal-math", *options, "--instruction", "")[0] == 0
    rows = read(tmp_path / "out" / "train.parquet")
    assert rows[0]["question"] == "a" and rows[0]["answer"] == "1 + 1 = 2\n#### 2"


# Rejected rows, and what is refused


def test_rows_that_cannot_be_used_are_listed_and_counted(tmp_path: Path, here: Main) -> None:
    rows = [
        *gsm8k_rows(2, 0),
        {"question": None, "answer": "#### 1"},
        {"question": " ", "answer": "#### 1"},
        {"question": "1?", "answer": ""},
        {"question": "1?", "answer": "one"},
        {"question": "\ud800", "answer": "#### 1"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in gsm8k_rows(3, 1)), encoding="utf-8")
    code, out, _ = here("gsm8k", "--local_dataset_path", tmp_path, "--local_dir", tmp_path / "out")
    assert code == 0
    assert "train: 7 rows read, 2 written\n  2 rejected: no question\n" in out
    assert "warning: 1 rows of test have a question of train" in out
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = ["no question"] * 2 + ["no answer", "the answer has no `#### result`", "a text is not valid Unicode"]
    assert [(line["row"], line["reason"]) for line in listed] == list(zip(range(2, 7), reasons, strict=True))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["prompts_also_in_first_split"] == {"test": 1}
    assert sum(manifest["splits"]["train"]["rejected"].values()) == 5


@pytest.mark.parametrize(
    ("dataset", "options", "found"),
    [
        ("gsm8k", ["--hdfs_dir", "hdfs://a/b"], "--hdfs_dir is not supported"),
        ("gsm8k", ["--splits", "train,validation"], "has no split 'validation'"),
        ("gsm8k", ["--splits", "../x"], "--splits: names of splits"),
        ("gsm8k", ["--splits", "train,train"], "--splits: names of splits"),
        ("custom", ["--prompt_column", "q"], "there is no column 'q'\n  found:    columns question, answer"),
        ("custom", ["--prompt_column", "question"], "--prompt_column and --response_column belong together"),
        ("sft-tool", [], "no row is left, nothing was written\n  found:    300 x no tool is called"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    dataset: str, options: list[str], found: str, sources: Path, tmp_path: Path, here: Main
) -> None:
    source = ["--local_dataset_path", sources / "gsm8k", "--local_save_dir", tmp_path / "out"]
    code, _, err = here(dataset, *source, *options)
    assert code == 2 and found in err
    assert not (tmp_path / "out").exists()


def test_a_missing_column_names_those_that_are_there(tmp_path: Path, here: Main) -> None:
    write_parquet(tmp_path / "train.parquet", [{"query": "1?", "reply": "#### 1"}])
    code, _, err = here("gsm8k", "--local_dataset_path", tmp_path, "--splits", "train", "--local_dir", tmp_path / "out")
    assert code == 2
    assert "train.parquet has no column for the question\n  found:    columns query, reply" in err
    assert "expected: one of question, problem" in err


def test_a_local_folder_as_data_source(sources: Path, tmp_path: Path, here: Main) -> None:
    assert here("informal-math", "--data_source", sources / "math", "--local-dir", tmp_path)[0] == 0
    assert {row["data_source"] for row in read(tmp_path / "math" / "test.parquet")} == {"math"}


def test_quiet(sources: Path, tmp_path: Path, here: Main) -> None:
    options = ["--local_dataset_path", sources / "gsm8k", "--local_dir", tmp_path, "--log_level", "WARNING"]
    assert here("gsm8k", *options) == (0, "", "")


# Own data

ALPACA = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
PAIRS = {"topic": {"q": "1?"}, "reply": "one", "sys": "Be brief.", "gold": 1}


@pytest.mark.parametrize(
    ("row", "options", "shape", "messages"),
    [
        (ALPACA, [], "Alpaca", [("user", "Add.\n\n1 and 1"), ("assistant", "2")]),
        (
            ALPACA | {"system": "S", "history": [["Hi", "Ho"]]},
            [],
            "Alpaca",
            [("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "Add.\n\n1 and 1"), ("assistant", "2")],
        ),
        (chat_rows(1, 4)[0], [], "ShareGPT conversations", [("user", "Is 4 even?"), ("assistant", "True")]),
        (
            {"chat": json.dumps([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}])},
            ["--messages_column", "chat"],
            "OpenAI messages",
            [("user", "u"), ("assistant", "a")],
        ),
        (
            PAIRS,
            ["--prompt_column", "topic.q", "--response_column", "reply", "--ground_truth_column", "gold"],
            "prompt and response by name",
            [("user", "1?"), ("assistant", "one")],
        ),
        (
            PAIRS,
            ["--prompt_column", "topic.q", "--response_column", "reply", "--system_column", "sys"],
            "prompt and response by name",
            [("system", "Be brief."), ("user", "1?"), ("assistant", "one")],
        ),
        ({"problem": "p", "cot": "c"}, [], "question and answer", [("user", "p"), ("assistant", "c")]),
    ],
)
def test_shapes_are_recognised_and_shown_before_anything_is_written(
    row: dict[str, Any], options: list[str], shape: str, messages: list[tuple[str, str]], tmp_path: Path, here: Main
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    given = ["--local_dataset_path", tmp_path / "rows.jsonl", "--splits", "train", "--local_save_dir", tmp_path / "out"]
    code, out, _ = here("custom", *given, *options, "--dry_run")
    assert code == 0 and f"recognised: {shape}" in out and "dry run" in out
    assert all(f"{role}: {json.dumps(text)}" in out for role, text in messages)
    assert not (tmp_path / "out").exists()
    assert here("custom", *given, *options)[0] == 0
    (made,) = read(tmp_path / "out" / "train.parquet")
    pair = [*made.get("prompt", []), {"role": "assistant", "content": made.get("answer")}]
    assert [(turn["role"], turn["content"]) for turn in made.get("messages", pair)] == messages
    if "--ground_truth_column" in options:
        assert made["reward_model"]["ground_truth"] == "1"
