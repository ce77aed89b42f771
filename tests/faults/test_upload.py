"""trainer.default_hdfs_dir: the finished model arrives whole or loudly not at all, and nothing is lost by that."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from apollo_sft.__main__ import main
from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder.folder import read_run
from apollo_sft.checkpoint.run_folder.settle import settle_run
from apollo_sft.config.compose import compose
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.errors import AlreadyDone, ConfigError, UploadError
from apollo_sft.train.upload import check_destination, upload
from tests.support.forked import train_on_ranks
from tests.support.runs import arguments, train_here, write_inputs
from tests.support.stores import Store

SHORT = ("trainer.total_training_steps=2", "data.val_files=null")


class Faulty(Store):
    """A store that notes what comes, and may fail at some file or cut it short."""

    protocol = "store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    came: ClassVar[list[str]] = []
    fails_at: str | None = None
    cuts: str | None = None
    denied = False

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        name = Path(rpath).name
        if name == self.fails_at:
            raise ConnectionResetError("reset by https://me:canary-of-mine@store")
        super().put_file(lpath, rpath, **kwargs)
        if name == self.cuts:
            self.pipe_file(rpath, self.cat_file(rpath)[:-1])
        self.came.append(name)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        if self.denied:
            raise PermissionError("Access Denied")
        super().pipe_file(path, value, **kwargs)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Faulty]]:
    fsspec.register_implementation("store", Faulty, clobber=True)
    for name, value in (("came", []), ("fails_at", None), ("cuts", None), ("denied", False)):
        monkeypatch.setattr(Faulty, name, value)
    yield Faulty
    Faulty.store.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def trainer(root: Path, to: str) -> TrainerConfig:
    keys = ["data.train_files=a.parquet", "data.val_files=null"]
    return compose([*keys, f"trainer.default_local_dir={root}", f"trainer.default_hdfs_dir={to}"]).config.trainer


def finished(root: Path, weights: bytes = b"w" * 3_000_000) -> Path:
    """What a run leaves, as far as an upload looks at it."""
    staging = publish.staging_folder(root, "model")
    for name, content in (("config.json", b"{}"), ("a-model.safetensors", weights), ("tokenizer.json", weights[:9])):
        (staging / name).write_bytes(content)
    publish.publish_model(staging, root, lambda _: None)
    (root / "checkpoints").mkdir(exist_ok=True)
    (root / "checkpoints" / "state.safetensors").write_bytes(b"not the model's")
    return root


def names_at(to: Path) -> set[str]:
    return {path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()}


def test_only_the_model_comes_and_config_json_last(store: type[Faulty], tmp_path: Path) -> None:
    upload(trainer(finished(tmp_path), "store://b/model"))
    assert store.came == ["a-model.safetensors", "tokenizer.json", "config.json"]
    fs = store()
    assert {Path(name).name for name in fs.find("/b")} == {*store.came, publish.MANIFEST}
    assert all(fs.cat_file(f"/b/model/{name}") == (tmp_path / name).read_bytes() for name in store.came)
    store.came.clear()
    upload(trainer(tmp_path, "store://b/model"))
    assert store.came == [], "it is complete there"


@pytest.mark.parametrize("fails_at", ["a-model.safetensors", "tokenizer.json", "config.json"])
def test_an_upload_that_was_interrupted_goes_on(fails_at: str, store: type[Faulty], tmp_path: Path) -> None:
    store.fails_at = fails_at
    with pytest.raises(UploadError) as caught:
        upload(trainer(finished(tmp_path), "store://b"))
    for words in ("store://b", "the model is complete in", str(tmp_path), "the same command again uploads alone"):
        assert words in str(caught.value)
    assert "canary" not in str(caught.value)
    assert not store().exists("/b/config.json"), "no part of a model loads"
    came, store.fails_at = list(store.came), None
    upload(trainer(tmp_path, "store://b"))
    assert store.came == ["a-model.safetensors", "tokenizer.json", "config.json"], "each came once"
    assert came == store.came[: len(came)]


def test_a_later_model_of_the_same_sizes_replaces_the_earlier_one(store: type[Faulty], tmp_path: Path) -> None:
    upload(trainer(finished(tmp_path / "one"), "store://b"))
    store.fails_at = "a-model.safetensors"
    again = trainer(finished(tmp_path / "two", b"v" * 3_000_000), "store://b")
    with pytest.raises(UploadError):
        upload(again)
    assert not store().exists("/b/config.json") and not store().exists("/b/tokenizer.json"), "no mixture of two models"
    store.fails_at = None
    upload(again)
    assert store().cat_file("/b/a-model.safetensors") == b"v" * 3_000_000


@pytest.mark.parametrize("name", ["a-model.safetensors", "tokenizer.json"])
def test_what_arrives_short_or_changed_is_an_error(name: str, store: type[Faulty], tmp_path: Path) -> None:
    store.cuts = name
    with pytest.raises(UploadError, match=f"{name} has [0-9]+ bytes there"):
        upload(trainer(finished(tmp_path), "store://b"))
    store.cuts = None
    upload(trainer(tmp_path, "store://b"))
    store().store["/b/tokenizer.json"].seek(0)
    store().store["/b/tokenizer.json"].write(b"other")
    with pytest.raises(UploadError, match=r"tokenizer\.json: the uploaded file differs from the local one"):
        upload(trainer(tmp_path, "store://b"))


@pytest.mark.parametrize("start", ["", "file://"])
def test_a_plain_folder_works_as_well(start: str, tmp_path: Path) -> None:
    upload(trainer(finished(tmp_path / "run"), f"{start}{tmp_path}/kept/here"))
    assert names_at(tmp_path / "kept" / "here") == {"a-model.safetensors", "tokenizer.json", "config.json", publish.MANIFEST}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("nope://a/b", "a scheme that fsspec knows"),
        ("s3://bucket/run", r"pip install 'apollo-sft\[s3\]'"),
        ("hdfs://host:8020/run", "JAVA_HOME"),
        ("/proc/nothing/here", "cannot be written"),
        ("{root}/run/model", "must not contain, or be inside, trainer.default_local_dir"),
        ("{root}", "must not contain, or be inside, trainer.default_local_dir"),
        ("{root}/foreign", "holds a model that was not uploaded by this program"),
    ],
)
def test_a_destination_is_refused_before_anything_is_done(
    to: str, said: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    to = to.format(root=tmp_path)
    with pytest.raises(ConfigError, match=said):
        check_destination(trainer(tmp_path / "run", to))
    assert main(arguments(inputs, tmp_path / "run", f"trainer.default_hdfs_dir={to}")) == 2
    assert "trainer.default_hdfs_dir" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_store_that_takes_nothing_is_refused_and_a_probe_leaves_nothing(store: type[Faulty], tmp_path: Path) -> None:
    check_destination(trainer(tmp_path, "store://b/c"))
    assert store().find("/b") == []
    store.denied = True
    with pytest.raises(ConfigError, match=r"cannot be written(?s:.*)Access Denied"):
        check_destination(trainer(tmp_path, "store://b/c"))


def test_a_run_whose_upload_fails_is_finished_and_starts_again_to_upload(
    store: type[Faulty], inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, to = tmp_path / "out", "trainer.default_hdfs_dir=store://b/model"
    store.fails_at = "config.json"
    assert main(arguments(inputs, out, *SHORT, to)) == UploadError.exit_code == 3
    assert "the same command again uploads alone" in capfd.readouterr().err
    run = read_run(out)
    assert run is not None and (run["status"], run["uploaded"]) == ("finished", False)
    assert settle_run(out, 3, 0) == 3
    assert (out / "config.json").is_file() and not store().exists("/b/model/config.json")
    store.fails_at = None
    with pytest.raises(AlreadyDone):
        train_here(inputs, out, *SHORT, to)
    model = json.loads((out / publish.MANIFEST).read_text())["files"]
    assert {Path(name).name for name in store().find("/b/model")} == {*model, publish.MANIFEST}
    assert all(store().cat_file(f"/b/model/{name}") == (out / name).read_bytes() for name in model)


def test_a_run_uploads_at_its_end(store: type[Faulty], inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapter = ("model.lora_rank=4", "trainer.export=both", "trainer.default_hdfs_dir=store://b")
    train_here(inputs, out, *SHORT, *adapter)
    assert {"model.safetensors", "config.json", "adapter_config.json"} <= set(store.came)
    assert set(store.came[-2:]) == {"config.json", "adapter_config.json"}
    assert not any("checkpoint" in name for name in store().find("/b"))
    run = read_run(out)
    assert run is not None and (run["status"], run["uploaded"]) == ("finished", True)


@pytest.mark.long
def test_two_ranks_upload_once(inputs: Path, tmp_path: Path) -> None:
    to = tmp_path / "kept"
    assert train_on_ranks(inputs, tmp_path / "out", 2, *SHORT, f"trainer.default_hdfs_dir={to}") == [0, 0]
    assert {"model.safetensors", "config.json"} <= names_at(to)
    assert "uploaded the model to" in (tmp_path / "ranks.log").read_text()
    (tmp_path / "blocked").write_text("a file")
    more = f"trainer.default_hdfs_dir={tmp_path}/blocked"
    assert train_on_ranks(inputs, tmp_path / "other", 2, *SHORT, more)[0] == 2
