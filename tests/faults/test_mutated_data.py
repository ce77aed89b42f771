"""Data files that were changed at random: one message that names file, row and column, or every good row trained."""

import time
import warnings
from pathlib import Path

import pytest

from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.errors import DataError
from tests.support.data import data_config, tiny_tokenizer
from tests.support.forked import train_on_ranks
from tests.support.mutated import Case, mutated
from tests.support.runs import write_inputs

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


@pytest.mark.parametrize("tens", range(20))
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
@pytest.mark.parametrize("hundreds", range(2, 22))
def test_two_thousand_more(hundreds: int, tmp_path: Path) -> None:
    for number in range(100 * hundreds, 100 * hundreds + 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(mutated(folder, number), folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("number", range(BY_COMMAND))
def test_the_command_says_it_once(number: int, inputs: Path, tmp_path: Path) -> None:
    """The entry as `python -m apollo_sft` runs it, in a process of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    case = mutated(folder, number)
    files = "[" + ",".join(f"'{path}'" for path in case.paths) + "]"
    more = (
        "data.val_files=null",
        f"data.multiturn.enable={str(case.multiturn).lower()}",
        f"data.store_dir={tmp_path}/s",
    )
    [code] = train_on_ranks(inputs, tmp_path / "out", 1, f"data.train_files={files}", *more)
    said = (tmp_path / "ranks.log").read_text()
    assert code == 2, said
    assert "Traceback" not in said and "arning" not in said
    [message] = said.split("apollo-sft: ")[1:]
    check_message(case, message)
