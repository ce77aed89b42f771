"""The last words of a run: of the whole run, however often it was started, and what each of them says can be done."""

from pathlib import Path

from apollo_sft.config.compose import compose
from apollo_sft.report.metrics import Record, StepFacts, train_record, val_record
from apollo_sft.report.sinks import RunInfo
from apollo_sft.train.finish import summary
from apollo_sft.train.reporter import Reporter


def step(number: int, val: float | None = None) -> Record:
    record = train_record(StepFacts(number, 2.0, 1.0, 1e-5, 60, 1000, 30.0, 0.1, 2**20))
    return record if val is None else record | val_record(val, 40)


def said(folder: Path, *keys: str) -> str:
    """After three steps, a stop that lost the last of them, and three more."""
    config = compose([f"trainer.default_local_dir={folder}", "trainer.logger=[]", *keys]).config
    for first_step, records in (
        (0, [step(1), step(2, 0.5), step(3)]),
        (2, [step(3), step(4, 0.7), step(5)]),
    ):
        reporter = Reporter(config.trainer, RunInfo(folder, "p", "e", {}, first_step), 5)
        for record in records:
            reporter.record(record)
        reporter.close()
    return summary(
        reporter, config.trainer, {"a": 1.0, "preparing the data": 2.0, "training": 150.0, "b": 5.0, "c": 62.0}
    )


def test_it_speaks_of_the_whole_run(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    text = said(folder, "trainer.save_best_on=val/loss")
    assert "Done: 5 steps, 5,000 tokens in 2:30." in text
    assert "Time: preparing the data 0:02, training 2:30, b 0:05, c 1:02." in text
    assert "Validation loss: last 0.7000, best 0.5000 at step 2." in text
    assert f"The best checkpoint is {folder}/checkpoints/best." in text
    assert f'AutoModelForCausalLM.from_pretrained("{folder}")' in text
    assert text.endswith(f"apollo-sft report '{folder}'")


def test_an_adapter_is_opened_in_its_own_way(tmp_path: Path) -> None:
    text = said(tmp_path, "model.lora_rank=8", "trainer.export=adapter")
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path}/adapter")' in text
    assert "AutoModelForCausalLM.from" not in text.replace("AutoPeft", "")
