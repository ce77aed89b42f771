"""`apollo-sft report` on real runs: what stands on the page, and what a browser makes of it."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from apollo_sft.cli.main import main
from tests.support.browser import BROWSER, browser
from tests.support.runs import read_metrics, train_here, write_inputs

SAID = [
    {"step": step, "row": f"val.parquet row {row}", "prompt": "user: one </p>", "expected": "two", "text": f"t{step}"}
    for step in (2, 4)
    for row in (0, 1)
]
FIRST_PLOT = """(() => {
  const plot = document.querySelector('.plot > svg');
  plot.scrollIntoView({block: 'center'});
  const box = plot.getBoundingClientRect();
  return [box.left, box.top, box.width, box.height];
})()"""
SHOWN = """[...document.querySelectorAll('.at text')]
  .filter(e => getComputedStyle(e).visibility === 'visible').map(e => e.textContent)"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in one key, beside their data."""
    folder = tmp_path_factory.mktemp("runs")
    inputs = write_inputs(folder / "inputs")
    for name, rate in (("first", 1e-2), ("second", 1e-3)):
        more = ("trainer.total_training_steps=4", "trainer.test_freq=2", f"optim.lr={rate}", "data.truncation=right")
        train_here(inputs, folder / name, *more, f"trainer.experiment_name={name}-{'long' * 20}", "data.max_length=22")
    lines = "".join(json.dumps(sample) + "\n" for sample in SAID)
    (folder / "first" / "samples.jsonl").write_text(lines + '{"step": 6, "row')  # the last line is being written
    return folder


def report(*arguments: str | Path) -> str:
    """The page."""
    out = Path(str(arguments[-1]))
    assert main(["report", *map(str, arguments[:-1]), "-o", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def words(page: str) -> str:
    page = page.replace("<wbr>", "")
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_the_page_of_a_run(runs: Path, tmp_path: Path) -> None:
    page = report(runs / "first", tmp_path / "page.html")
    text = words(page)
    metrics = read_metrics(runs / "first")
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"):
        assert f"<b>{title}</b>" in page
    for step in (1, 2, 3, 4):
        assert f"step {step} training {metrics[step - 1]['train/loss']:.4g}" in text
    assert f"{metrics[-1]['val/loss']:.4f} last validation loss" in text
    assert "rejected.jsonl in the run folder names every one" in text
    assert "optim.lr 0.01" in text and "keys at defaults" in text
    assert f"torch {json.loads((runs / 'first' / 'run.json').read_text())['versions']['torch']}" in text
    assert "<mark>" in page and "train.parquet row" in text
    assert "prompt user: one </p> in the data two step 4 t4 1 earlier step 2 t2" in text


def test_words_fit_what_is_drawn(runs: Path, tmp_path: Path) -> None:
    """Of a few steps nothing is faint; a best loss is named where it is not the last one."""
    text = words(report(runs / "first", tmp_path / "page.html"))
    assert "From left to right: steps. The pointer" in text
    assert "model · finished · 20" in text
    shutil.copytree(runs / "first", tmp_path / "long")
    losses = {50: 1.0, 80: 1.01}
    records = [
        {"step": step, "train/loss": 1.0} | ({"val/loss": losses[step]} if step in losses else {})
        for step in range(1, 81)
    ]
    (tmp_path / "long" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = words(report(tmp_path / "long", tmp_path / "page.html"))
    assert "The faint line is every step, the strong one a moving mean." in text
    assert "validation loss ends at 1.0100; the best is 1.0000, at step 50" in text
    records[-1]["val/loss"] = 0.99
    (tmp_path / "long" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "ends at 0.9900, the best of the run" in words(report(tmp_path / "long", tmp_path / "page.html"))


def test_two_runs_are_one_plot_each_and_what_differs(runs: Path, tmp_path: Path) -> None:
    text = words(report(runs / "first", runs / "second", tmp_path / "page.html"))
    assert "first · training" in text and "second · validation" in text
    differing = text.partition("What differs")[2].partition("Everything else is the same.")[0]
    assert "optim.lr 0.01 0.001" in differing
    assert "data.max_length" not in differing
    for name in ("first", "second"):
        assert f"{read_metrics(runs / name)[-1]['val/loss']:.4f}" in text


def test_a_run_without_its_data_and_one_that_broke_off(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "first", tmp_path / "run")
    audit = json.loads((tmp_path / "run" / "data_audit.json").read_text())
    audit["train"]["store"] = str(tmp_path / "gone")
    (tmp_path / "run" / "data_audit.json").write_text(json.dumps(audit))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"status": "failed"}))
    page = report(tmp_path / "run", tmp_path / "page.html")
    assert "<mark>" not in page and "the run failed" in page
    assert "no trained samples" in capsys.readouterr().err
    for name in ("metrics.jsonl", "data_audit.json", "samples.jsonl", "rejected.jsonl", "config.yaml"):
        (tmp_path / "run" / name).unlink()
    assert "Nothing was measured" in report(tmp_path / "run", "--no-samples", tmp_path / "page.html")


@pytest.mark.parametrize(
    ("name", "content", "code", "part"),
    [
        (None, "", 2, "is not the folder of a run"),
        ("run.json", "{", 1, "not what a run writes"),
        ("metrics.jsonl", "[]\n", 1, "not what a run writes"),
        ("config.yaml", "a: [", 1, "not what a run writes"),
        ("rejected.jsonl", "{}\n", 1, "not what a run writes"),
    ],
)
def test_what_cannot_be_read_is_said(
    name: str | None, content: str, code: int, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name is not None:
        (tmp_path / "run.json").write_text("{}")
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == code
    assert part in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_shows_it_whole_and_asks_for_nothing(runs: Path, tmp_path: Path) -> None:
    report(runs / "first", tmp_path / "one.html")
    report(runs / "first", runs / "second", tmp_path / "two.html")
    with browser(tmp_path) as open_page:
        for name, width, dark in (("one", 1280, True), ("one", 390, False), ("two", 1280, False), ("two", 390, True)):
            path = tmp_path / f"{name}.html"
            page = open_page(path, width, dark)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.overflowing() == []
            left, top, wide, high = page.evaluate(FIRST_PLOT)
            assert wide > width / 2 and high > 100
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background))) < 384) == dark
            page.hover(left + wide / 2, top + high / 2)
            shown = page.evaluate(SHOWN)
            assert shown[0].startswith("step ") and len(shown) >= 2
            page.wait_for_save()
            assert page.requests == [path.as_uri()]
            assert page.complaints == []


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_the_browser_test_sees_what_overflows_and_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<meta name='viewport' content='width=device-width'><body><div style='width:900px'>wide</div>"
        "<img src='http://127.0.0.1:9/x.png'><script>nothing()</script></body>"
    )
    with browser(tmp_path) as open_page:
        page = open_page(tmp_path / "bad.html", 390)
        page.wait_for_save()
        assert any("wide" in text for text in page.overflowing())
        assert "http://127.0.0.1:9/x.png" in page.requests
        assert "nothing is not defined" in " ".join(page.complaints)
