"""Data files that were changed at random: one message that names file, row and column, or every good row trained."""

import time
import warnings
from pathlib import Path

import pytest

from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.errors import DataError
from tests.support.data import data_config, tiny_tokenizer
from tests.support.entry import Entry, assert_refused
from tests.support.forked import train_on_ranks
from tests.support.mutated import Case, mutated
from tests.support.runs import arguments, write_inputs

SECONDS = 10
"""CPU time: the tests beside this one take their share of the machine."""
LONGEST_MESSAGE = 3000
BY_COMMAND = 20
"""All of them are refused."""


def rendered(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


def check_message(case: Case, text: str) -> None:
    missing = [words for words in case.said if words not in text]
    assert not missing, f"{case.name}: {missing} not in {text}"
    assert len(text) < LONGEST_MESSAGE and "Traceback" not in text


def check(case: Case, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    data = data_config(case.multiturn, store_dir=str(folder / "store"), max_length=4096)
    request = StoreRequest("train", case.paths, -1, tokenizer, resolve_template(tokenizer, data), data)
    begun = time.process_time()
    if case.said:
        with pytest.raises(DataError) as caught:
            prepare_store(request, lambda _: None)
        check_message(case, str(caught.value))
        assert not list((folder / "store").glob("*/meta.json")), f"{case.name}: a store was left"
    else:
        store = prepare_store(request, lambda _: None)
        assert store.summary.num_rows == len(store) == len(case.kept), case.name
        trained = [tokenizer.decode(store[i].input_ids) for i in range(len(store))]
        assert trained == [rendered(messages) for messages in case.kept], case.name
    assert time.process_time() - begun < SECONDS, case.name


@pytest.mark.parametrize("tens", range(10))
def test_mutated_data_give_one_message_or_every_row(
    tens: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(10 * tens, 10 * tens + 10):
        folder = tmp_path / str(number)
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(mutated(folder, number), folder)
    written = capfd.readouterr()
    assert written.out + written.err == ""


@pytest.mark.long
@pytest.mark.parametrize("hundreds", range(1, 22))
def test_two_thousand_one_hundred_more(hundreds: int, tmp_path: Path) -> None:
    for number in range(100 * hundreds, 100 * hundreds + 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(mutated(folder, number), folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def of_command(case: Case, tmp_path: Path) -> list[str]:
    """The keys for which a training reads the data of this case."""
    files = "[" + ",".join(f"'{path}'" for path in case.paths) + "]"
    return [
        f"data.train_files={files}",
        "data.val_files=null",
        f"data.multiturn.enable={str(case.multiturn).lower()}",
        f"data.store_dir={tmp_path}/s",
    ]


def check_command(case: Case, said: str) -> None:
    assert "Traceback" not in said and "arning" not in said
    [message] = said.split("apollo-sft: ")[1:]
    check_message(case, message)


@pytest.fixture
def entry(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Entry:
    return Entry(capfd, monkeypatch)


@pytest.mark.parametrize("number", range(BY_COMMAND))
def test_the_command_says_it_once(number: int, inputs: Path, tmp_path: Path, entry: Entry) -> None:
    """The entry as `python -m apollo_sft` runs it."""
    folder = tmp_path / "data"
    folder.mkdir()
    case = mutated(folder, number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = entry(arguments(inputs, tmp_path / "out", *of_command(case, tmp_path)))
    assert_refused(ended)
    check_command(case, ended.said)


def test_a_process_of_its_own_says_it_once(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    case = mutated(folder, 0)
    [code] = train_on_ranks(inputs, tmp_path / "out", 1, *of_command(case, tmp_path))
    said = (tmp_path / "ranks.log").read_text()
    assert code == 2, said
    check_command(case, said)
