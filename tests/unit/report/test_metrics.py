import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
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
        "perf/data_wait_seconds": 0.0,
    }
    assert train_record(replace(FACTS, mfu=0.4, data_wait_seconds=0.1)) == train_record(FACTS) | {
        "perf/mfu": 0.4,
        "perf/data_wait_seconds": 0.1,
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
    writer = MetricsWriter(path, first_step=2)
    writer.write({"step": 3})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_file_with_nothing_but_a_broken_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step"')
    MetricsWriter(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize(("done", "kept"), [(0, []), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_steps_that_will_be_done_again_are_cut_off(tmp_path: Path, done: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(4)))
    MetricsWriter(path, first_step=done).close()
    assert [record["step"] for record in read_metrics(path)] == kept


def test_lines_are_whole_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from pathlib import Path; from apollo_sft.report.metrics import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1]))\n"
        "for step in range(1, 10**9):\n"
        "    writer.write({'step': step, 'train/loss': 1 / step})\n"
        "    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 200:
                process.kill()
                break
        last_said = int([line, *process.stdout.read().split("\n")[:-1]][-1])
    assert process.returncode == -signal.SIGKILL
    records = read_metrics(path)
    assert len(records) >= last_said >= 200
    assert records == [{"step": step, "train/loss": 1 / step} for step in range(1, len(records) + 1)]


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    """Numbers that other languages read: no NaN, no Infinity, integers stay integers."""
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(train_record(FACTS) | {"memory/peak_bytes": 2**60 + 1})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    [line] = path.read_bytes().decode("ascii").split("\n")[:-1]
    record = json.loads(line, parse_constant=refuse)
    assert record["memory/peak_bytes"] == 2**60 + 1
    assert [name for name, value in record.items() if isinstance(value, int)] == [
        "step",
        "train/targets",
        "train/tokens",
        "memory/peak_bytes",
    ]
