import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.template import ChatTemplate, resolve_template
from apollo_sft.data.store.fingerprint import store_key
from apollo_sft.data.store.open import SampleStore, StoreRequest, StoreSummary, prepare_store
from apollo_sft.data.store.store_files import StoreWriter
from apollo_sft.data.store.tokenise import Tokeniser
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, RowRef, Sample
from tests.support.data import CHATML, CLOSING, FORGETFUL, STARTING, chat, data_config, tiny_tokenizer, write_parquet


def qa(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"what is {i}", "answer": "four " * (i % 5 + 1)} for i in range(first, first + count)]


def request(tmp_path: Path, *paths: str, max_rows: int = -1, multiturn: bool = False, **changes: Any) -> StoreRequest:
    tokenizer = tiny_tokenizer()
    data = data_config(multiturn, **({"store_dir": str(tmp_path / "store")} | changes))
    return StoreRequest("train", paths, max_rows, tokenizer, resolve_template(tokenizer, data), data)


def quiet(_: str) -> None:
    pass


def folders(tmp_path: Path) -> list[str]:
    """What lies in the store folder besides locks and remembered hashes."""
    names = (p.name for p in (tmp_path / "store").iterdir())
    return sorted(name for name in names if not name.endswith(".lock") and name != "hashes")


def test_the_store_holds_what_the_renderer_gives(tmp_path: Path) -> None:
    files = [write_parquet(tmp_path / "a.parquet", qa(700)), write_parquet(tmp_path / "b.parquet", qa(3, 700))]
    wanted = request(tmp_path, *files)
    store = prepare_store(wanted, quiet)
    renderer = Renderer(wanted.tokenizer, wanted.template, wanted.data)
    assert len(store) == 703
    for i in (0, 1, 511, 512, 699, 700, 702):
        question, answer = f"what is {i}", "four " * (i % 5 + 1)
        [[sample]] = renderer.render([Conversation(chat(question, answer), None, {}, store.ref(i))])
        assert store[i].input_ids.tolist() == sample.input_ids.tolist()
        assert store[i].labels.tolist() == sample.labels.tolist()
        assert (store[i].turns, store.lengths[i], store.num_targets[i]) == (
            (1,),
            len(sample.labels),
            sample.num_targets,
        )
    assert (store.ref(699).file, store.ref(699).row) == (files[0], 699)
    assert (store.ref(702).file, store.ref(702).row) == (files[1], 2)
    assert (store.lengths.dtype, store.num_targets.dtype, store[0].input_ids.dtype) == (np.int32,) * 3
    assert not store[0].input_ids.flags.writeable
    with pytest.raises(IndexError):
        store[703]


def test_the_summary_adds_up(tmp_path: Path) -> None:
    store = prepare_store(request(tmp_path, write_parquet(tmp_path / "a.parquet", qa(20))), quiet)
    summary = store.summary
    assert (summary.num_rows, summary.num_samples, summary.num_turns) == (20, 20, 20)
    assert (summary.num_tokens, summary.num_targets) == (store.lengths.sum(), store.num_targets.sum())
    assert summary.longest_tokens == store.lengths.max()
    assert summary.longest_row == str(store.ref(int(store.lengths.argmax())))
    assert summary.max_token_id == max(store[i].input_ids.max() for i in range(20))
    assert summary.stop_tokens == {tiny_tokenizer().convert_tokens_to_ids("<|im_end|>"): 20}
    assert (summary.tokens_cut, summary.over_max_length.count, summary.not_trained.count) == (0, 0, 0)


def test_a_second_call_opens_what_the_first_built(tmp_path: Path) -> None:
    wanted = request(tmp_path, write_parquet(tmp_path / "a.parquet", qa(20)), max_rows=5)
    said: list[str] = []
    first = prepare_store(wanted, said.append)
    assert len(first) == 5
    assert len(said) == 1
    assert "tokenised 5 train rows" in said[0]
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again = prepare_store(wanted, said.append)
    assert (len(said), again.folder, (again.folder / "meta.json").stat().st_mtime_ns) == (1, first.folder, stamp)
    assert folders(tmp_path) == [first.key]


def test_a_damaged_store_is_built_again(tmp_path: Path) -> None:
    wanted = request(tmp_path, write_parquet(tmp_path / "a.parquet", qa(20)))
    first = prepare_store(wanted, quiet)
    ids = [first[i].input_ids.tolist() for i in range(20)]
    for damage in ("input_ids.npy", "meta.json", "turns.npy"):
        path = first.folder / damage
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        again = prepare_store(wanted, quiet)
        assert [again[i].input_ids.tolist() for i in range(20)] == ids


def test_files_tokenizer_and_template_change_the_key(tmp_path: Path) -> None:
    """What the keys of the configuration change is asked in tests/contract/test_keys.py, of all of them."""
    file = write_parquet(tmp_path / "a.parquet", qa(20))
    base = request(tmp_path, file)

    def key(
        files: list[str] | None = None, max_rows: int = -1, tokenizer: Any = None, template: ChatTemplate | None = None
    ) -> str:
        used = (tokenizer or base.tokenizer, template or base.template)
        return store_key(files or [file], max_rows, *used, base.data, tmp_path / "hashes")

    bigger = tiny_tokenizer()
    bigger.add_tokens(["<extra>"])
    swapped = tiny_tokenizer()
    swapped.eos_token = "<|im_end|>"
    other = write_parquet(tmp_path / "b.parquet", qa(20))
    keys = [
        key(),
        key(files=[other]),
        key(files=[file, other]),
        key(files=[other, file]),
        key(max_rows=5),
        key(tokenizer=bigger),
        key(tokenizer=swapped),
        key(template=ChatTemplate(CHATML + " ", "test")),
        key(template=ChatTemplate(CHATML, "test", "other with tools")),
    ]
    assert len(set(keys)) == len(keys)
    assert key(template=ChatTemplate(CHATML, "another source")) == keys[0]
    assert key(tokenizer=tiny_tokenizer()) == keys[0]

    content = bytearray(Path(file).read_bytes())
    os.utime(file)
    assert key() == keys[0]
    content[len(content) // 3] ^= 1
    stat = Path(file).stat()
    Path(file).write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert key() != keys[0]


def refused(wanted: StoreRequest, *said: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare_store(wanted, quiet)
    for words in said:
        assert words in str(caught.value)


def test_rows_over_max_length_are_listed_up_front(tmp_path: Path) -> None:
    rows = qa(700)
    rows[600]["answer"] = "x" * 300
    rows[650]["answer"] = "x" * 400
    file = write_parquet(tmp_path / "a.parquet", rows)
    refused(
        request(tmp_path, file, max_length=200),
        "2 of 700 rows are longer than data.max_length",
        f"first: {file} row 600",
        f"longest: {file} row 650",
        "data.truncation=right",
    )
    assert all(name.endswith(".error") for name in folders(tmp_path))


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_is_counted_and_conserves_tokens(tmp_path: Path, side: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", qa(50))
    whole = prepare_store(request(tmp_path, file), quiet)
    limit = int(np.median(whole.lengths))
    cut = prepare_store(request(tmp_path, file, max_length=limit, truncation=side), quiet)
    summary = cut.summary
    over = int((whole.lengths > limit).sum())
    assert (summary.over_max_length.count, summary.samples_truncated) == (over, over)
    assert cut.lengths.max() == limit
    assert summary.num_tokens + summary.tokens_cut == whole.summary.num_tokens
    assert summary.num_targets + summary.targets_lost == whole.summary.num_targets
    assert summary.longest_tokens == whole.lengths.max()


def test_a_row_without_a_target_is_reported_never_trained(tmp_path: Path) -> None:
    rows = qa(10)
    rows[4]["question"] = "long " * 100
    file = write_parquet(tmp_path / "a.parquet", rows)
    whole = prepare_store(request(tmp_path, file), quiet)
    store = prepare_store(request(tmp_path, file, max_length=100, truncation="right"), quiet)
    summary = store.summary
    assert (summary.num_rows, summary.num_samples, summary.not_trained.count) == (10, 9, 1)
    assert summary.not_trained.examples == [f"{file} row 4"]
    assert [store.ref(i).row for i in range(9)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert store.num_targets.min() > 0
    assert summary.num_tokens + summary.tokens_cut + summary.tokens_not_trained == whole.summary.num_tokens
    assert summary.num_targets + summary.targets_lost == whole.summary.num_targets


def test_the_ledger_names_every_row_that_is_not_trained_or_not_whole(tmp_path: Path) -> None:
    rows = [row | {"train": i != 2} for i, row in enumerate(qa(5))]
    rows[1]["answer"] = "x" * 60
    rows[3]["question"] = "<|im_end|>"
    rows[4]["question"] = "y" * 60
    file = write_parquet(tmp_path / "a.parquet", rows)
    changes = {"max_length": 50, "special_tokens_in_content": "drop"}
    reasons = {}
    for how in ("right", "left", "drop"):
        store = prepare_store(request(tmp_path, file, truncation=how, **changes), quiet)
        assert [entry.file for entry in store.rejected()] == [file] * 4
        reasons[how] = [(entry.row, entry.trained, entry.reason) for entry in store.rejected()]
        lost = sum(entry.tokens_lost for entry in store.rejected())
        assert lost == store.summary.tokens_cut + store.summary.tokens_not_trained
        assert sum(entry.targets_lost for entry in store.rejected()) == store.summary.targets_lost
        trained = {entry.row for entry in store.rejected() if entry.trained}
        assert {store.ref(i).row for i in range(len(store))} == {0} | trained
        assert store.summary.not_trained.count == 5 - len(store)
    whole, forged = (
        (2, False, "nothing in it is trained"),
        "message 0 spells <|im_end|> (data.special_tokens_in_content=drop)",
    )
    assert reasons["right"][1:] == [whole, (3, False, forged), (4, False, "no target is left (data.truncation=right)")]
    assert reasons["right"][0][2].startswith("cut on the right: ")
    assert [row for row, trained, _ in reasons["left"] if trained] == [1, 4]
    assert reasons["drop"][0][2].endswith("tokens, more than data.max_length (data.truncation=drop)")
    assert [trained for _, trained, _ in reasons["drop"]] == [False] * 4


def test_tokens_are_conserved_over_random_mixes(tmp_path: Path) -> None:
    """Every token and target of every rendering is trained or in the ledger, whatever is cut, dropped or left out."""
    draw = random.Random(3)
    tokenizer = tiny_tokenizer(bos_token="<|user|>")
    for mix in range(100):
        template = draw.choice([CHATML, "{{ bos_token }}" + CHATML, FORGETFUL, CLOSING, STARTING])
        how = draw.choice(["left", "right", "drop"])
        data = data_config(
            max_length=draw.randint(2, 60),
            truncation=how,
            special_tokens_in_content=draw.choice(["drop", "allow"]),
            history=draw.choice(["expand", "last_turn"]),
            chat_template=template,
        )
        rows = []
        for i in range(10):
            words = [
                "ab " * draw.randint(0, 12) + draw.choice(["", "<|im_end|>"]) for _ in range(draw.choice([2, 4, 6]))
            ]
            skip = frozenset(k for k in range(len(words)) if draw.random() < 0.1)
            rows.append(Conversation(chat(*words), None, {}, RowRef("f", i), skip))
        wanted = StoreRequest("train", ["f"], -1, tokenizer, resolve_template(tokenizer, data), data)
        folder = tmp_path / str(mix)
        folder.mkdir()
        writer = StoreWriter(folder, ["f"])
        summary = StoreSummary(files=["f"])
        for chunk in Tokeniser(wanted).run([(row.ref, row) for row in rows], writer):
            summary.add(chunk)
        writer.finish("key", summary)
        check_conservation(SampleStore(folder), Renderer(tokenizer, wanted.template, data).render(rows), how)


def check_conservation(store: SampleStore, rendered: list[list[Sample]], how: str) -> None:
    whole = [sample for row in rendered for sample in row]
    ledger, summary = list(store.rejected()), store.summary
    assert summary.num_tokens == store.lengths.sum()
    assert summary.num_targets == store.num_targets.sum()
    lost = sum(entry.tokens_lost for entry in ledger)
    assert sum(len(sample.input_ids) for sample in whole) == summary.num_tokens + lost
    assert lost == summary.tokens_cut + summary.tokens_not_trained
    targets_lost = sum(entry.targets_lost for entry in ledger)
    assert sum(sample.num_targets for sample in whole) == summary.num_targets + targets_lost
    assert targets_lost == summary.targets_lost
    for i in range(len(store)):
        assert (store[i].labels != IGNORE_INDEX).any()
        if how == "right":
            [source] = [s for s in rendered[store.ref(i).row] if s.turns == store[i].turns]
            assert store[i].input_ids.tolist() == source.input_ids[: store.lengths[i]].tolist()


def test_a_dataset_without_rows_or_targets_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", qa(10))
    refused(request(tmp_path, file, max_length=5, truncation="right"), "no row has a token to train on", "10 rows")
    refused(request(tmp_path, file, max_rows=0), "data.train_files: there is no row")


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    rows = qa(1300)
    rows[7]["answer"] = None
    file = write_parquet(tmp_path / "a.parquet", rows)
    refused(request(tmp_path, file), f"{file} row 7, column answer: the cell is null")
    for i in (20, 600, 1299):
        rows[i]["question"] = None
    file = write_parquet(tmp_path / "b.parquet", rows)
    said: list[str] = []
    with pytest.raises(DataError) as caught:
        prepare_store(request(tmp_path, file), said.append)
    assert f"{file} row 7, column answer: the cell is null" in said[0], "nobody has to wait for the first"
    lines = str(caught.value).splitlines()
    assert lines[0] == "data.train_files: 4 of 1,300 rows cannot be used"
    assert lines[1].split() == ["found:", "3", "x", "column", "question:", "the", "cell", "is", "null"]
    assert lines[2].strip() == f"first {file} row 20, {file} row 600, {file} row 1299"
    assert lines[3].strip() == "1 x column answer: the cell is null"
    assert lines[4].strip() == f"first {file} row 7"
    assert "data.bad_rows=skip" in lines[6]
    dialogue = write_parquet(tmp_path / "c.parquet", [{"messages": chat("a", "b", "c", "d")}])
    template = (
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}"
    )
    refused(request(tmp_path, dialogue, multiturn=True, chat_template=template), "row 0, turn 1", "as its generation")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = request(tmp_path, write_parquet(tmp_path / "a.parquet", qa(3)), store_dir=str(tmp_path / "file"))
    refused(wanted, "data.store_dir", str(tmp_path / "file"))


def _prepare(tmp_path: Path, file: str, queue: Any, pause: float) -> None:
    time.sleep(pause)
    said: list[str] = []
    try:
        store = prepare_store(request(tmp_path, file), said.append)
        queue.put((len(store), int(store._ids.sum()), sum("train rows in" in line for line in said)))
    except DataError as error:
        queue.put(str(error))


def _race(tmp_path: Path, file: str, size: int) -> list[Any]:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_prepare, args=(tmp_path, file, queue, 0.01 * i)) for i in range(size)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    return results


def test_racing_processes_tokenise_once(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", qa(3000))
    results = _race(tmp_path, file, 3)
    assert len({result[:2] for result in results}) == 1
    assert results[0][0] == 3000
    assert sorted(result[2] for result in results) == [0, 0, 1]
    assert len(folders(tmp_path)) == 1


def test_racing_processes_meet_the_same_error(tmp_path: Path) -> None:
    rows = qa(3000)
    rows[2999]["answer"] = None
    file = write_parquet(tmp_path / "a.parquet", rows)
    results = _race(tmp_path, file, 3)
    assert len(set(results)) == 1
    assert f"{file} row 2999, column answer: the cell is null" in results[0]


def test_a_killed_build_leaves_nothing_that_could_be_taken_for_a_store(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", qa(5000))
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_prepare, args=(tmp_path, file, context.Queue(), 0.0))
    worker.start()
    deadline = time.monotonic() + 30
    ids = None
    while time.monotonic() < deadline and (ids is None or ids.stat().st_size < 10_000):
        ids = next(iter((tmp_path / "store").glob(".building-*/input_ids.npy")), None)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    [left] = folders(tmp_path)
    assert left.startswith(".building-")
    with pytest.raises((OSError, ValueError)):
        SampleStore(tmp_path / "store" / left)
    store = prepare_store(request(tmp_path, file), quiet)
    assert len(store) == 5000
    assert folders(tmp_path) == [store.key]
    assert json.loads((store.folder / "meta.json").read_text())["key"] == store.key
