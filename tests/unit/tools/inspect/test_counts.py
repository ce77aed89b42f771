import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import PlanSpec, steps_per_epoch
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import SampleStore, StoreRequest, prepare_store
from apollo_sft.data.store.store_files import Rejected
from apollo_sft.errors import DataError
from apollo_sft.tools.inspect import counts as inspection
from apollo_sft.tools.inspect.counts import Found
from apollo_sft.types import Conversation, RowRef
from tests.support.data import FORGETFUL, UNSTOPPED, chat, data_config, tiny_tokenizer, write_parquet

Rows = list[dict[str, Any]]


def prepare(folder: Path, files: dict[str, Rows], **changes: Any) -> SampleStore:
    tokenizer = tiny_tokenizer(**({"chat_template": changes.pop("template")} if "template" in changes else {}))
    data = data_config(True, store_dir=str(folder / "store"), **changes)
    paths = [write_parquet(folder / name, rows) for name, rows in files.items()]
    request = StoreRequest("train", paths, -1, tokenizer, resolve_template(tokenizer, data), data)
    return prepare_store(request, lambda _: None)


def conversations(number: int) -> Rows:
    """Of 1 to 3 turns and very different lengths; one in seven types a control token."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(number):
        texts = [
            "one two " * (1 + int(rng.integers(0, 30)) // int(rng.integers(1, 6)))
            for _ in range(2 * int(rng.integers(1, 4)))
        ]
        texts[0] += "<|im_end|>" if index % 7 == 3 else ""
        rows.append({"messages": chat(*texts)})
    return rows


@pytest.mark.parametrize("truncation", ["left", "right", "drop"])
@pytest.mark.parametrize("history", ["expand", "last_turn", "as_rendered"])
def test_no_token_is_lost_unreported(tmp_path: Path, truncation: str, history: str) -> None:
    """What the renderer makes of every row = what is trained + what the ledger says, file by file."""
    files = {"a.parquet": conversations(30), "b.parquet": conversations(11)}
    changes = {"history": history, "special_tokens_in_content": "drop", "max_length": 90}
    store = prepare(tmp_path, files, template=FORGETFUL, truncation=truncation, **changes)
    tokenizer = tiny_tokenizer(FORGETFUL)
    data = data_config(True, **changes)
    for counts, rows in zip(inspection.count_files(store), files.values(), strict=True):
        renderer = Renderer(tokenizer, resolve_template(tokenizer, data), data)
        whole = renderer.render([Conversation(row["messages"], None, {}, RowRef("x", 0)) for row in rows])
        samples = [sample for row in whole for sample in row]
        assert counts.rows == len(rows)
        assert counts.tokens + counts.tokens_lost == sum(len(sample.input_ids) for sample in samples)
        assert counts.targets + counts.targets_lost == sum(sample.num_targets for sample in samples)
        assert counts.tokens_lost > 0 and counts.rows_trained < counts.rows
    found = inspection.losses(store.rejected())
    assert sum(loss.tokens for loss in found) == sum(entry.tokens_lost for entry in store.rejected())
    assert {loss.kind for loss in found} == {"dropped"} | ({"cut"} if truncation != "drop" else set()) | (
        {"left out"} if history == "last_turn" else set()
    )


def test_losses_are_grouped_by_reason_whatever_numbers_and_findings_it_holds() -> None:
    entries = [Rejected("f", row, (1,), True, f"cut on the left: {row} of 9 tokens", row, 1) for row in (1, 2, 3)]
    entries += [Rejected("f", 3, (3,), True, "cut on the left: 7 of 9 tokens", 7, 2)]
    entries += [
        Rejected("f", row, (), False, f"f row {row}: bad text\n  found:    {row} signs\n  to do:    mend it", 0, 0)
        for row in (12, 4)
    ]
    cut, refused = inspection.losses(entries)
    assert (cut.kind, len(cut.rows), cut.samples, cut.tokens, cut.targets) == ("cut", 3, 4, 13, 5)
    assert cut.reason == "cut on the left: … of … tokens"
    assert cut.examples == ["f row 1", "f row 2", "f row 3"]
    assert (refused.kind, refused.reason, refused.found) == ("refused", "bad text", "12 signs")
    assert refused.examples == ["f row 12", "f row 4"]


def test_replies_that_the_template_does_not_write_whole_stand_in_the_ledger(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    thinking = {"role": "assistant", "content": "two", "reasoning_content": "hm"}
    silent: Rows = [{"messages": [*chat("a", "b", "c"), calling, *chat("d"), thinking]}, {"messages": chat("a", "b")}]
    store = prepare(tmp_path, {"a.parquet": silent})
    calls, reasoning = inspection.losses(store.rejected())
    assert {calls.kind, reasoning.kind} == {"incomplete"}
    assert (calls.reason, calls.examples) == (
        "replies trained without their tool calls, which the template does not write",
        [f"{tmp_path}/a.parquet row 0, turn 3"],
    )
    assert (len(calls.rows), calls.tokens, reasoning.examples) == (1, 0, [f"{tmp_path}/a.parquet row 0, turn 5"])
    [counts] = inspection.count_files(store)
    assert (counts.rows, counts.rows_trained) == (2, 2)


def test_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xed\xa0\x80", b"ok"]).view(pa.string())
    pq.write_table(pa.table({"prompt": pa.array(["q"] * 3), "response": bad}), tmp_path / "a.parquet")
    tokenizer = tiny_tokenizer()
    data = data_config(
        store_dir=str(tmp_path / "s"), bad_rows="skip", max_bad_ratio=1.0, prompt_key="prompt", response_key="response"
    )
    file, template = str(tmp_path / "a.parquet"), resolve_template(tokenizer, data)
    request = StoreRequest("train", [file], -1, tokenizer, template, data)
    store = prepare_store(request, lambda _: None)
    assert (len(store), store.summary.num_rows) == (2, 3)
    [entry] = store.rejected()
    assert entry.row == 1 and "column response: the text is not valid UTF-8" in entry.reason
    strict = replace(request, data=data.model_copy(update={"bad_rows": "error"}))
    with pytest.raises(DataError, match="row 1, column response: the text is not valid UTF-8"):
        prepare_store(strict, lambda _: None)


def test_the_histogram_begins_with_the_shortest_sample() -> None:
    lengths = np.arange(1500, 2000, 7)
    bars = inspection.histogram(lengths)
    assert bars[0][:2] == (1500, 1549) and len(bars) == 10 and bars[0][2] == 8


def test_duplicates_and_overlap_name_both_rows(tmp_path: Path) -> None:
    one, two, three = ({"messages": chat("q", text)} for text in ("one", "two", "three"))
    train = prepare(tmp_path, {"a.parquet": [one, two, one], "b.parquet": [two, one]})
    val = prepare(tmp_path, {"v.parquet": [three, two]})
    assert inspection.duplicates(train, inspection.scan(train).digests) == Found(
        3,
        [
            f"{tmp_path}/a.parquet row 2 = {tmp_path}/a.parquet row 0",
            f"{tmp_path}/b.parquet row 0 = {tmp_path}/a.parquet row 1",
            f"{tmp_path}/b.parquet row 1 = {tmp_path}/a.parquet row 0",
        ],
    )
    assert inspection.duplicates(val, inspection.scan(val).digests).count == 0
    shared = inspection.overlap(train, inspection.scan(train).digests, val, inspection.scan(val).digests)
    assert (shared.count, shared.examples) == (1, [f"{tmp_path}/v.parquet row 1 = {tmp_path}/a.parquet row 1"])


def test_samples_without_a_stop_token_are_found(tmp_path: Path) -> None:
    rows: Rows = [{"messages": chat("q", "a")}, {"messages": chat("q", "one two three " * 30)}]
    cut = prepare(tmp_path, {"a.parquet": rows}, max_length=40, truncation="right")
    assert inspection.scan(cut).unstopped == Found(1, [f"{tmp_path}/a.parquet row 1"])
    never = prepare(tmp_path, {"a.parquet": rows}, template=UNSTOPPED)
    assert inspection.scan(never).unstopped.count == 2


@pytest.mark.parametrize("longest", [1, 2, 15, 16, 17, 99, 1000, 32768])
def test_the_histogram_holds_every_sample_once(longest: int) -> None:
    lengths = np.random.default_rng(1).integers(1, longest + 1, 500).astype(np.int32)
    lengths[0] = longest
    bars = inspection.histogram(lengths)
    assert len(bars) <= inspection.MOST_BARS
    for low, high, number in bars:
        assert number == ((lengths >= low) & (lengths <= high)).sum()
    assert sum(number for _, _, number in bars) == 500
    assert bars[-1][0] <= longest <= bars[-1][1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"dp_size": 3}, {"max_tokens": 200}, {"dp_size": 2, "max_tokens": 150, "balance": True, "batch_size": 5}],
)
@pytest.mark.parametrize("multiple", [1, 4])
def test_packing_is_that_of_the_loader(tmp_path: Path, changes: dict[str, Any], multiple: int) -> None:
    store = prepare(tmp_path, {"a.parquet": conversations(23)}, special_tokens_in_content="allow")
    spec = PlanSpec(**({"batch_size": 8, "micro_batch_size": 3, "dp_size": 1, "seed": 1} | changes))
    found = inspection.packing(store.lengths, spec, multiple)
    steps = range(steps_per_epoch(len(store), spec))
    batches = [Loader(store, spec, rank, multiple).batch(step) for step in steps for rank in range(spec.dp_size)]
    packed = [batch for step in batches for batch in step.micro_batches]
    computed, tokens = sum(batch.input_ids.numel() for batch in packed), int(store.lengths.sum())
    assert found.steps_seen == len(steps)
    assert found.forwards_per_step == len(packed) / len(batches)
    assert found.padding_ratio == pytest.approx((computed - tokens) / computed)
    assert found.samples_per_forward == pytest.approx(len(store) / len(packed))
    assert found.tokens_per_forward == pytest.approx(tokens / len(packed))
    longest = [store.lengths[[ref.row for ref in rows]] for batch in batches for rows in batch.rows if rows]
    assert found.most_tokens == max(lengths.sum() for lengths in longest)
    assert found.padded_ratio == pytest.approx(1 - tokens / sum(lengths.max() * len(lengths) for lengths in longest))
    assert (found.fill_ratio is None) == (spec.max_tokens is None)


def test_the_dump_holds_what_is_trained(tmp_path: Path) -> None:
    rows: Rows = [{"messages": chat("a", "é👩‍👧", "c", " two\n")}, {"messages": chat("x", "日本 " * 40)}]
    store = prepare(tmp_path, {"a.parquet": rows}, max_length=70, truncation="left")
    path = tmp_path / "dump.jsonl"
    assert inspection.write_dump([("train", store)], tiny_tokenizer(), path) == 2
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert (first["file"], first["row"], first["turns"]) == (f"{tmp_path}/a.parquet", 0, [1, 3])
    assert first["targets"] == ["é👩‍👧<|im_end|>", " two\n<|im_end|>"]
    assert first["input_ids"] == store[0].input_ids.tolist()
    assert first["labels"] == store[0].labels.tolist()
    assert len(second["labels"]) == 70 and second["targets"][0].endswith("日本 <|im_end|>")
