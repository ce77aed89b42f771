import json
import math
from pathlib import Path

import pytest

from apollo_sft.report.metrics import MetricsWriter, StepFacts, read_metrics, train_record, val_record

FACTS = StepFacts(
    step=3,
    loss=1.25,
    grad_norm=2.5,
    lr=1e-5,
    targets=600,
    tokens=1000,
    step_seconds=0.5,
    epoch=0.3,
    peak_bytes=2**30,
)


def test_records_hold_the_documented_names_and_units() -> None:
    assert train_record(FACTS) == {
        "step": 3,
        "train/loss": 1.25,
        "train/grad_norm": 2.5,
        "train/lr": 1e-5,
        "train/targets": 600,
        "train/tokens": 1000,
        "train/tokens_per_second": 2000.0,
        "train/step_seconds": 0.5,
        "train/epoch": 0.3,
        "memory/peak_bytes": 2**30,
    }
    assert val_record(loss=1.5, targets=70) == {"val/loss": 1.5, "val/targets": 70}


def test_what_was_written_is_in_the_file_before_close(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(train_record(FACTS))
    writer.write({"step": 4} | val_record(1.5, 70))
    lines = path.read_text().splitlines()
    writer.close()
    assert [json.loads(line) for line in lines] == [
        train_record(FACTS),
        {"step": 4, "val/loss": 1.5, "val/targets": 70},
    ]


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    loss = math.nextafter(1 / 3, 1)
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1, "train/loss": loss})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path: Path, value: float) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(AssertionError, match="train/loss"):
        writer.write({"step": 1, "train/loss": value})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("tail", ['{"step": 3, "train/lo', "{", "\0\0\0"])
def test_a_line_broken_by_a_crash_is_cut_off_and_the_rest_kept(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    writer = MetricsWriter(path)
    writer.write({"step": 3})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_file_with_nothing_but_a_broken_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step"')
    MetricsWriter(path).close()
    assert read_metrics(path) == []
