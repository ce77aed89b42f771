from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from apollo_sft.errors import ConfigError, DataError
from apollo_sft.model.generate import interval
from apollo_sft.tools.evaluate.questions import Settings, chosen_engine, fitting_keys, read_questions, take_exam
from tests.support.chain import write_chain_model
from tests.support.data import chat, data_config, write_parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain_model(tmp_path_factory.mktemp("chain") / "model")


def _rl_row(question: str, answer: str, truth: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "system", "content": "think"}, {"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"question": question, "answer": answer, "index": 0, "split": "test"},
        "question": question,
        "answer": answer,
    }


def test_a_model_is_scored_by_its_final_answers(folder: Path, tmp_path: Path):
    rows = [{"question": f"what is {n}", "answer": f"it is\n#### {n}"} for n in (7, 8, 7, 9)]
    file = write_parquet(tmp_path / "q.parquet", rows)
    questions = read_questions([file], data_config())
    exam = take_exam(str(folder), questions, Settings(max_new_tokens=16, batch_size=3, engine="transformers"))
    assert [one.right for one in exam.answered] == [True, False, True, False]
    assert (exam.num_right, exam.num_stopped, exam.num_tokens) == (2, 4, 4 * 10)
    record = exam.answered[1].record()
    assert record["prompt"] == "<|im_start|>user\nwhat is 8<|im_end|>\n<|im_start|>assistant\n"
    assert (record["row"], record["answer"], record["extracted"]) == (1, "\\boxed{7}", "7")
    assert (record["truth"], record["right"], record["stopped"]) == ("8", False, True)


def test_a_reply_that_is_cut_off_has_not_stopped(folder: Path, tmp_path: Path):
    file = write_parquet(tmp_path / "q.parquet", [{"question": "what", "answer": "#### 7"}])
    exam = take_exam(str(folder), read_questions([file], data_config()), Settings(max_new_tokens=9))
    assert exam.num_right == 1
    assert exam.num_stopped == 0
    assert exam.num_tokens == 9


def test_the_stop_is_what_the_generation_config_says(tmp_path: Path):
    folder = write_chain_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (brace,) = tokenizer.encode("{", add_special_tokens=False)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [brace]}))
    file = write_parquet(tmp_path / "q.parquet", [{"question": "what", "answer": "#### 7"}])
    exam = take_exam(str(folder), read_questions([file], data_config()), Settings(max_new_tokens=16))
    assert exam.answered[0].reply.text == "\\boxed"
    assert exam.num_stopped == 1


def test_the_ground_truth_of_a_reward_comes_before_the_response(tmp_path: Path):
    file = write_parquet(tmp_path / "q.parquet", [_rl_row("what", "#### 3", "1,234"), _rl_row("why", "no mark", "5")])
    data = data_config(prompt_key="prompt")
    questions = read_questions([file], data)
    assert [q.truth for q in questions] == ["1234", "5"]
    assert [m["role"] for m in questions[0].messages] == ["system", "user"]
    keyed = read_questions([file], data_config(prompt_key="extra_info", response_key="extra_info"), 1)
    assert [(q.messages, q.truth) for q in keyed] == [([{"role": "user", "content": "what"}], "1234")]


def test_of_a_conversation_the_last_reply_is_asked_for(tmp_path: Path):
    file = write_parquet(tmp_path / "q.parquet", [{"messages": chat("a", "b", "c", "so \\boxed{4}")}])
    (question,) = read_questions([file], data_config(multiturn=True))
    assert question.messages == chat("a", "b", "c")
    assert question.truth == "4"


def test_a_row_without_an_answer_is_refused_by_its_place(tmp_path: Path):
    file = write_parquet(
        tmp_path / "q.parquet", [{"question": "what", "answer": "#### 1"}, {"question": "what", "answer": ""}]
    )
    with pytest.raises(DataError, match=r"q\.parquet row 1 has no answer"):
        read_questions([file], data_config())
    file = write_parquet(tmp_path / "q.parquet", [{"question": "what"}])
    with pytest.raises(DataError, match="row 0 has no answer"):
        read_questions([file], data_config())


@pytest.mark.parametrize(
    ("columns", "prompt_key", "multiturn"),
    [
        (["question", "answer"], "question", False),
        (["prompt", "reward_model", "extra_info"], "prompt", False),
        (["extra_info", "answer"], "extra_info", False),
        (["messages"], "mine", True),
        (["mine", "messages", "prompt"], "mine", False),
        (["other"], "mine", False),
    ],
)
def test_the_keys_of_the_run_stay_where_the_file_has_their_columns(
    columns: list[str], prompt_key: str, multiturn: bool
):
    fitting = fitting_keys(data_config(prompt_key="mine"), columns)
    assert (fitting.prompt_key, fitting.multiturn.enable) == (prompt_key, multiturn)


def test_an_engine_that_is_not_installed_is_refused():
    assert chosen_engine("auto") in ("transformers", "vllm")
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        chosen_engine("vllm")


def test_the_interval_is_wilsons():
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(0, 20)[0] == 0.0
    assert interval(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert interval(20, 20)[1] == 1.0
