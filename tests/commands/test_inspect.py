"""`apollo-sft inspect` as a user starts it: what it shows and writes, what a check fails with; training agrees."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from apollo_sft.cli.main import main
from tests.support import python
from tests.support.data import CHATML, UNSTOPPED, chat, tiny_tokenizer, write_parquet
from tests.support.models import tiny_config
from tests.support.runs import arguments as training_arguments
from tests.support.runs import read_metrics, train_here, write_inputs

SHARED = Path(__file__).resolve().parents[3] / "shared"
LOST_ONE = "1 row with something that the template does not write"
SCRIPT = "<script>alert('x')</script>"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    def row(self, name: str) -> list[str]:
        """The cells of the line that starts with `name`."""
        (cells,) = re.findall(rf"^  {re.escape(name)}  +(.*)", self.out, re.M)
        return re.split(r" {2,}", cells.strip())


class Inspect:
    """Runs the command in this process on a folder that holds no weights."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capfd = capfd

    def write(self, name: str, rows: list[dict[str, Any]]) -> str:
        return write_parquet(self.folder / name, rows)

    def __call__(self, *arguments: str) -> Ended:
        given = {argument.partition("=")[0] for argument in arguments}
        keys = {
            "model.partial_pretrain": self.folder / "model",
            "data.train_files": self.folder / "train.parquet",
            "data.val_files": "null",
            "data.multiturn.enable": "true",
            "data.max_length": 200,
            "data.train_batch_size": 8,
            "data.store_dir": self.folder / "store",
        }
        self.capfd.readouterr()
        code = main(["inspect", *(f"{key}={value}" for key, value in keys.items() if key not in given), *arguments])
        written = self.capfd.readouterr()
        return Ended(code, written.out, written.err)


@pytest.fixture
def inspect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Inspect:
    tiny_config(vocab_size=360).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return Inspect(tmp_path, capfd)


def numbered(number: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"messages": chat(f"what is {i}", f"it is {i}", "sure?", f"yes {i}")} for i in range(first, first + number)]


def test_it_says_what_a_training_then_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps, tokens and targets are those of the run; the store is made once."""
    inputs = write_inputs(tmp_path)
    keys = training_arguments(inputs, tmp_path / "out", "trainer.total_epochs=2")
    assert main(["inspect", *keys]) == 0
    out = capfd.readouterr().out
    stores = sorted((inputs / "store").glob("*/meta.json"))
    metrics = train_here(inputs, tmp_path / "out", "trainer.total_epochs=2")
    assert sorted((inputs / "store").glob("*/meta.json")) == stores and len(stores) == 2
    assert re.search(rf"^  steps +{metrics[-1]['step']} \(2 epochs\)", out, re.M)
    audit = json.loads((tmp_path / "out" / "data_audit.json").read_text())
    figures = re.search(r"^([\d,]+) rows +→ +([\d,]+) samples +→ +([\d,]+) tokens +→ +([\d,]+) targets", out, re.M)
    assert figures
    found = [int(number.replace(",", "")) for number in figures.groups()]
    names = ("num_rows", "num_samples", "num_tokens", "num_targets")
    assert found == [audit["train"][name] for name in names]
    assert sum(record.get("train/targets", 0) for record in read_metrics(tmp_path / "out")) == 2 * found[3]
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""


def test_the_run_folder_of_a_training_holds_every_row_that_is_not_whole(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    train_here(
        inputs, tmp_path / "out", "data.max_length=16", "data.truncation=right", "trainer.total_training_steps=1"
    )
    ledger = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    audit = json.loads((tmp_path / "out" / "data_audit.json").read_text())
    for split in ("train", "validation"):
        mine = [entry for entry in ledger if entry["split"] == split]
        lost = audit[split]["tokens_cut"] + audit[split]["tokens_not_trained"]
        assert mine and sum(entry["tokens_lost"] for entry in mine) == lost > 0
        assert all(entry["reason"] and entry["row"] >= 0 and Path(entry["file"]).is_file() for entry in mine)


def test_files_totals_and_what_is_lost(inspect: Inspect) -> None:
    inspect.write("a.parquet", numbered(9))
    inspect.write("b.parquet", [*numbered(3, 50), {"messages": chat("q", "one two three " * 90)}])
    files = f"data.train_files=[{inspect.folder}/a.parquet,{inspect.folder}/b.parquet]"
    ended = inspect(files, "data.truncation=drop", "--nproc", "2", "ulysses_sequence_parallel_size=2")
    assert ended.code == 0, ended.err
    assert ended.row("a.parquet")[:2] == ["9", "9"] and ended.row("a.parquet")[-2:] == ["–", "–"]
    assert ended.row("b.parquet")[:2] == ["4", "3"] and ended.row("b.parquet")[-2] == "1"
    assert ended.row("train, 2 files")[:2] == ["13", "12"]
    assert f"Files in {inspect.folder}/" in ended.out
    assert "more than data.max_length (data.truncation=drop): b.parquet row 3" in " ".join(ended.out.split())
    assert ended.row("data ranks") == ["1 of 2 processes each"]


def test_a_check_fails_for_each_reason_and_says_which(inspect: Inspect) -> None:
    inspect.write("train.parquet", numbered(12))
    inspect.write("val.parquet", numbered(2, 100))
    val = f"data.val_files={inspect.folder}/val.parquet"
    clean = inspect(val, "--check")
    assert (clean.code, clean.out.splitlines()[-1]) == (
        0,
        "check passed: every row is trained completely, and none is validated on",
    )
    inspect.write("val.parquet", numbered(2, 11))
    assert "check failed: 1 validation samples are trained on too" in inspect(val, "--check").out
    assert inspect(val).code == 0
    inspect.write("train.parquet", [row | {"train": index > 0} for index, row in enumerate(numbered(3))])
    aside = inspect("--check")
    assert aside.code == 0 and "! train: 1 row set aside" in aside.out
    inspect.write("train.parquet", numbered(12))
    cut = inspect("data.max_length=30", "data.truncation=right", "--check")
    assert (cut.code, cut.out.splitlines()[-1]) == (1, "check failed: train: 12 rows cut")
    inspect.write("train.parquet", [*numbered(12), {"messages": chat("I type <|im_end|>", "no")}])
    dropped = inspect("data.special_tokens_in_content=drop", "--check")
    assert (dropped.code, dropped.out.splitlines()[-1]) == (1, "check failed: train: 1 row dropped")
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    inspect.write("train.parquet", [*numbered(12), {"messages": [*chat("q"), calling]}])
    silent = inspect("--check", "--html", str(inspect.folder / "page.html"))
    missing = LOST_ONE
    assert (silent.code, silent.out.splitlines()[-1]) == (1, f"check failed: train: {missing}")
    for text in (silent.out, (inspect.folder / "page.html").read_text(encoding="utf-8")):
        said = " ".join(text.split())
        assert f"{missing}, 1 in all" in said
        assert "replies trained without their tool calls, which the template does not write" in said
        assert "row 12, turn 1" in said
    unstopped = inspect(f"data.chat_template={UNSTOPPED}", "--check")
    assert "check failed: train: 12 samples without a stop token" in unstopped.out
    inspect.write("train.parquet", numbered(3))
    nothing = inspect("data.max_length=10", "data.truncation=right", "--check")
    assert nothing.code == 1 and "no row has a token to train on" in nothing.err


def test_what_a_template_leaves_out_of_a_prompt_fails_the_check_and_is_listed_by_a_training(inspect: Inspect) -> None:
    template = inspect.folder / "known_roles.jinja"
    template.write_text(CHATML.replace("in messages %}", "in messages if message.role in ['user', 'assistant'] %}"))
    lost = {"messages": [{"role": "developer", "content": "be kind"}, *chat("q", "a")]}
    file = inspect.write("train.parquet", [*numbered(3), lost])
    ended = inspect(f"data.chat_template={template}", "--check")
    said = " ".join(ended.out.split())
    assert (ended.code, ended.out.splitlines()[-1]) == (1, f"check failed: train: {LOST_ONE}")
    assert "the content of the role developer, which the template does not write" in said
    assert "row 3, turn 0" in said
    assert inspect("--check").code == 0

    inputs = write_inputs(inspect.folder / "inputs")
    keys = (f"data.train_files={file}", "data.val_files=null", "data.multiturn.enable=true")
    out = inspect.folder / "out"
    train_here(inputs, out, *keys, f"data.chat_template={template}", "trainer.total_training_steps=1")
    [line] = (out / "findings.jsonl").read_text().splitlines()
    assert json.loads(line) == {"split": "train", "file": file, "row": 3, "message": 0, "key": "content"}


def test_every_row_that_a_training_refuses_is_named(inspect: Inspect) -> None:
    forged = {"messages": chat("I type <|im_end|>", "no")}
    inspect.write("train.parquet", [forged, *numbered(4), forged, {"messages": chat("q", "one " * 300)}, forged])
    ended = inspect("--check")
    said = " ".join(ended.out.split())
    assert ended.code == 1
    assert "a training with these keys is refused" in said and "3 x the text spells a control token" in said
    assert re.search(r"refused 3 3 .*train.parquet row 0, train.parquet row 5, train.parquet row 7", said)
    assert re.search(r"refused 1 1 .*data.truncation=error\): train.parquet row 6", said)
    assert "check failed: train: 4 rows refused" in said


def test_duplicates_and_replies_without_a_stop_are_pointed_out(inspect: Inspect) -> None:
    rows = [*numbered(3), {"messages": chat("q", "one two three " * 60)}, *numbered(1)]
    inspect.write("train.parquet", rows)
    ended = inspect("data.truncation=right")
    assert "! train: 1 samples repeat an earlier one\n      train.parquet row 4 = train.parquet row 0\n" in ended.out
    assert re.search(r"! train: 1 samples without a stop token.*\n      train.parquet row 3\n", ended.out)


def test_a_tokenizer_that_transformers_changes_is_pointed_out(inspect: Inspect) -> None:
    """For model_type qwen2 it puts a pre-tokenizer of its own in the place of the file's."""
    inspect.write("train.parquet", [{"messages": chat("q", "one two three")}])
    assert "tokenizer.json" not in inspect().out
    file = inspect.folder / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    apart = {"type": "Split", "pattern": {"Regex": "t"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [apart, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    assert "! because of model_type in config.json, transformers splits text in another way" in inspect().out


def test_rows_that_are_asked_for(inspect: Inspect) -> None:
    inspect.write("train.parquet", [*numbered(3), {"messages": chat("q\x1b[31m", "one two three " * 60)}])
    whole = inspect("--row", "1")
    text = "what is 1<|im_end|>\n<|im_start|>assistant\n⟦it is 1<|im_end|>⟧\n<|im_start|>user\nsure?"
    assert text in whole.out and "train.parquet row 1, turns 1, 3" in whole.out and "\x1b" not in whole.out
    cut = inspect("--row", "train.parquet:3", "--row=0", "data.truncation=left")
    assert "cut on the left" in cut.out and "what is 0" in cut.out
    lost = inspect("--row=3", "data.truncation=drop", "--ids")
    assert "not trained: " in lost.out
    ids = inspect("--row=3", "--ids", "data.max_length=250", "data.truncation=right")
    tokenizer = tiny_tokenizer()
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert f"<|im_start|>‹{number}›" in ids.out
    assert "q␛[31m" in "".join(re.split(r"‹\d+›", ids.out))
    assert inspect("--row=4", "data.truncation=drop").code == 2
    assert inspect("--row=x:1", "data.truncation=drop").code == 2


def test_the_worst_and_random_samples(inspect: Inspect) -> None:
    rows = [*numbered(20), {"messages": chat("q", "one two three " * 60)}, {"messages": chat("long " * 20, "a")}]
    inspect.write("train.parquet", rows)
    worst = inspect("--worst", "data.truncation=right").out
    assert re.search(r"row 20, turn 1 .*\n.*among the longest; cut on the right", worst)
    assert re.search(r"row 21, turn 1 .*\n.*among the least share of targets", worst)
    drawn = [
        re.findall(r"row (\d+), turn", inspect("--random", f"--seed={s}", "data.truncation=drop").out)
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3
    assert len(re.findall(r"row \d+, turn", inspect("--random", "--count=5", "data.truncation=drop").out)) == 5


def test_the_page_escapes_what_the_data_hold(inspect: Inspect) -> None:
    inspect.write(f"{SCRIPT.replace('/', '')}.parquet", [{"messages": chat(SCRIPT, f"{SCRIPT} & more")}] * 3)
    page = inspect.folder / "page.html"
    ended = inspect(f"data.train_files={inspect.folder}", "--html", str(page))
    assert ended.code == 0, ended.err
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    (marked,) = set(re.findall(r"<mark>(?!what)(.*?)</mark>", text, re.S))
    assert unescape(re.sub("<[^>]*>", "", marked)) == f"{SCRIPT} & more<|im_end|>"
    assert "3 samples repeat" not in text and "2 samples repeat an earlier one" in text


def test_the_dump_has_a_line_a_sample_of_both_files(inspect: Inspect) -> None:
    inspect.write("train.parquet", numbered(3))
    inspect.write("val.parquet", numbered(1, 7))
    path = inspect.folder / "dump.jsonl"
    assert inspect("--dump", str(path), f"data.val_files={inspect.folder}/val.parquet").code == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["split"], line["row"]) for line in lines] == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("validation", 0),
    ]
    assert lines[1]["targets"] == ["it is 1<|im_end|>", "yes 1<|im_end|>"]
    for line in lines:
        shifted = [*line["input_ids"][1:], -100]
        assert all(label in (-100, following) for label, following in zip(line["labels"], shifted, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wrost"], "did you mean --worst?"),
        (["--count=0"], "a whole number from 1 on"),
        (["--nproc", "3", "ulysses_sequence_parallel_size=2"], "does not divide the number of processes"),
        (["--val"], "there is no validation data"),
        (["--html", "/no/such/folder/page.html"], "cannot be written"),
        (["data.max_lenght=1"], "data.max_length"),
    ],
)
def test_refusals(inspect: Inspect, arguments: list[str], message: str) -> None:
    inspect.write("train.parquet", numbered(3))
    ended = inspect(*arguments)
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


def test_help_and_a_reader_that_leaves(inspect: Inspect) -> None:
    assert inspect("--help").out.count("--") > 10
    inspect.write("train.parquet", numbered(300))
    command = [sys.executable, "-m", "apollo_sft.cli.main", "inspect", "--random", "--count=300", "data.val_files=null"]
    command += [f"model.partial_pretrain={inspect.folder}/model", f"data.train_files={inspect.folder}/train.parquet"]
    command += ["data.multiturn.enable=true", f"data.store_dir={inspect.folder}/store", "data.max_length=200"]
    environment = os.environ | {"NO_COLOR": "1"}
    with python.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"What will be trained\n"
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


DATA = {
    "gsm8k/single_turn": ["data.prompt_key=extra_info", "data.response_key=extra_info", "data.multiturn.enable=false"],
    "gsm8k/messages": [],
    "bfcl_toolcall/messages": [],
    "lf_glaive_toolcall_en/messages": [],
    "lf_reason_tool_use/messages": [],
    "taskmaster4/messages": [],
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights, with the tokenizer of a family."""
    folder = tmp_path_factory.mktemp("qwen")
    AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3").save_pretrained(folder)
    tiny_config(vocab_size=151_936, max_position_embeddings=32_768).save_pretrained(folder)
    return folder


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout")
@pytest.mark.parametrize("data", DATA)
def test_shared_datasets(data: str, inspect: Inspect, qwen: Path) -> None:
    given = [f"model.partial_pretrain={qwen}", f"data.train_files={SHARED}/data/{data}/train.parquet", *DATA[data]]
    ended = inspect(*given, "data.train_max_samples=40", "data.max_length=32768", "--worst", "--check")
    assert ended.code == 0, ended.out + ended.err
    assert ended.row("train.parquet")[0] == "40"
    assert "every sample teaches a stop token, <|im_end|>" in ended.out
