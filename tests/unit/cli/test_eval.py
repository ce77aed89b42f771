from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from apollo_sft.cli.main import main
from apollo_sft.config.compose import compose, to_yaml
from apollo_sft.errors import ConfigError
from apollo_sft.tools.evaluate.questions import data_keys
from tests.support.chain import write_chain_model
from tests.support.data import write_parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain_model(tmp_path_factory.mktemp("chain") / "model")


@pytest.fixture
def questions(tmp_path: Path) -> str:
    rows = [{"question": f"what is {n}", "answer": f"it is\n#### {n}"} for n in (7, 8, 7, 9)]
    return write_parquet(tmp_path / "q.parquet", rows)


def _run_folder(folder: Path, *overrides: str) -> None:
    (folder / "run.json").write_text(json.dumps({"kind": "apollo-sft run", "status": "finished"}))
    config = compose(["data.train_files=t.parquet", "data.val_files=null", *overrides]).config
    (folder / "config.yaml").write_text(to_yaml(config))


def test_the_table_the_figures_and_the_file_of_generations(
    folder: Path, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "said.jsonl"
    assert main(["eval", f"{folder}/", questions, "--out", str(out), "--max-new-tokens", "16"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4: 50.0 %, 95 % interval 15.0 to 85.0 %" in printed
    assert "100.0 %: ended by a stop token" in printed
    assert "what is 8" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["right"] for line in lines] == [True, False, True, False]
    assert set(lines[0]) >= {"row", "prompt", "answer", "extracted", "truth", "right"}


def test_the_result_as_json(folder: Path, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["eval", str(folder), questions, "--out", str(tmp_path / "o"), "--json", "--limit", "1"]
    assert main([*arguments, "--max-new-tokens", "16"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["right"], figures["accuracy"], figures["stopped"]) == (1, 1, 1.0, 1.0)


def test_columns_are_those_of_the_run_unless_the_command_line_says_so(tmp_path: Path):
    run = tmp_path / "run"
    hf = run / "checkpoints" / "step_000002" / "hf"
    hf.mkdir(parents=True)
    (run / "checkpoints" / "latest").symlink_to("step_000002")
    _run_folder(run, "data.prompt_key=extra_info", "data.prompt_dict_keys=[q]", "data.template_date=2024-02-03")
    composed = compose(["data.train_files=t.parquet", "data.val_files=null", "data.prompt_dict_keys=[other]"])
    for folder in (run, run / "checkpoints" / "latest" / "hf"):
        data = data_keys(folder, composed)
        assert (data.prompt_key, data.prompt_dict_keys) == ("extra_info", ("other",))
        assert data.template_date == "2024-02-03"
    assert data_keys(tmp_path, composed).prompt_key == "question"


def test_the_config_of_an_older_version_lacks_keys_and_has_other_values(tmp_path: Path):
    _run_folder(tmp_path, "data.prompt_key=extra_info")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del saved["data"]["history"], saved["data"]["multiturn"]["tools_key"]
    del saved["trainer"]["collective_timeout_seconds"]
    saved["model"]["lora_alpha"] = "sixteen"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    composed = compose(["data.train_files=t.parquet", "data.val_files=null"])
    data = data_keys(tmp_path, composed)
    assert data == composed.config.data.model_copy(update={"prompt_key": "extra_info"})
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        data_keys(tmp_path, composed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required"),
        (["{folder}/nowhere", "{questions}"], "no model folder"),
        (["{folder}", "nowhere.parquet"], "no such file"),
        (["{folder}", "{questions}", "--limit", "0"], "at least 1"),
        (["{folder}", "{questions}", "data.prompt_ky=a"], "did you mean data.prompt_key"),
        (["{folder}", "{questions}", "data.prompt_key=a"], "has no column 'a'"),
        (["{folder}", "{questions}", "--out", "no/such/folder"], "cannot be written"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    arguments: list[str], words: str, folder: Path, questions: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", *(text.format(folder=folder, questions=questions) for text in arguments)]) == 2
    assert words in capsys.readouterr().err
