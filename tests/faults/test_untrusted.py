"""Model folders, adapters, data files and checkpoints of strangers: what would run their code or leave their folder.

Every malicious file here makes a folder named `executed` when it has its way.
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from apollo_sft.checkpoint.publish import DIRECTORY_MANIFEST, describe_files
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.checkpoint.run_folder.state import read_state, snapshot, write_state
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import CheckpointError
from tests.support.entry import Entry, assert_refused
from tests.support.models import save_tiny_adapter
from tests.support.runs import arguments, train_here, write_inputs

PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "extra.pkl", ".metadata")


class Bomb:
    """Unpickling it makes the folder."""

    def __init__(self, executed: Path) -> None:
        self.executed = executed

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.executed),)


@pytest.fixture
def executed(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def inputs(honest: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(honest, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def entry(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Entry:
    return Entry(capfd, monkeypatch)


@pytest.fixture
def adapter(inputs: Path) -> Path:
    """Ask for it before `entry`, which lets nobody read weights."""
    return save_tiny_adapter(inputs / "model").rename(inputs / "adapter")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def module(folder: Path, executed: Path, name: str = "evil") -> None:
    (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(executed)!r})\n")


def test_the_bombs_go_off_where_they_are_opened(executed: Path, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(executed)))  # noqa: S301 - the test of the tests
    assert executed.is_dir()


def archive(path: Path, executed: Path) -> None:
    """What torch.save writes, by hand."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(executed)))
        file.writestr("archive/version", "3")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_pickled_weights(entry: Entry, inputs: Path, executed: Path, name: str) -> None:
    (inputs / "model" / "model.safetensors").unlink()
    archive(inputs / "model" / name, executed)
    ended = entry(arguments(inputs, inputs / "out"))
    assert_refused(ended, name, "pickled weights are not read", "save_pretrained")
    assert not executed.exists()


def test_an_index_of_pickles(entry: Entry, inputs: Path, executed: Path) -> None:
    model = inputs / "model"
    (model / "model.safetensors").unlink()
    archive(model / "shard.bin", executed)
    edit(model / "model.safetensors.index.json", weight_map={"lm_head.weight": "shard.bin"})
    assert_refused(entry(arguments(inputs, inputs / "out")), "shard.bin")
    assert not executed.exists()


def test_a_pickled_adapter(adapter: Path, entry: Entry, inputs: Path, executed: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    archive(adapter / "adapter_model.bin", executed)
    ended = entry(arguments(inputs, inputs / "out", f"model.lora_adapter_path={adapter}"))
    assert_refused(ended, "adapter_model.safetensors")
    assert not executed.exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.npy", "rows.parquet"])
def test_pickled_rows(entry: Entry, inputs: Path, executed: Path, name: str) -> None:
    if name.endswith(".npy"):
        np.save(inputs / name, np.array([Bomb(executed)], dtype=object), allow_pickle=True)
    else:
        (inputs / name).write_bytes(pickle.dumps(Bomb(executed)))
    ended = entry(arguments(inputs, inputs / "out", f"data.train_files={inputs / name}"))
    assert_refused(ended, name, "not a readable parquet file")
    assert not executed.exists()


def test_an_extension_type_of_arrow_that_is_a_pickle(inputs: Path, executed: Path) -> None:
    """CVE-2023-47248."""
    field = pa.field("answer", pa.string(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(executed), protocol=0).decode("latin1"),
    })  # fmt: skip
    columns = [pa.array(["one", "two"] * 8), pa.array(["three", "four"] * 8)]
    table = pa.table(columns, schema=pa.schema([pa.field("question", pa.string()), field]))
    pq.write_table(table, inputs / "train.parquet")
    train_here(inputs, inputs / "out", "trainer.total_training_steps=1", "data.val_files=null")
    assert not executed.exists()


def test_pickles_beside_a_good_model_are_never_opened(inputs: Path, executed: Path) -> None:
    for name in PICKLES:
        (inputs / "model" / name).write_bytes(pickle.dumps(Bomb(executed)))
    module(inputs / "model", executed)
    out = inputs / "out"
    train_here(inputs, out, "trainer.total_training_steps=1", "data.val_files=null")
    assert not executed.exists()
    assert not {path.name for path in out.iterdir()} & {*PICKLES, "evil.py"}


def test_an_array_of_objects_in_the_token_store(inputs: Path, executed: Path) -> None:
    train_here(inputs, inputs / "out", "trainer.total_training_steps=1", "data.val_files=null")
    [meta] = (inputs / "store").glob("*/meta.json")
    np.save(meta.parent / "labels.npy", np.array([Bomb(executed)], dtype=object), allow_pickle=True)
    train_here(inputs, inputs / "again", "trainer.total_training_steps=1", "data.val_files=null")
    assert not executed.exists()
    assert SampleStore(meta.parent)[0].labels.dtype == np.int32, "it was built again"


def test_the_metadata_of_dcp_is_never_read(tmp_path: Path, executed: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = tmp_path / "step_000001"
    folder.mkdir()
    parts = ("model", "optimizer", "extra")
    write_state(folder, snapshot(model, optimizer, parts, copy=True), {"step": 1}, True)
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb(executed)))
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.weight.zero_()
    read_state(folder, model, optimizer, 1, True)
    assert torch.equal(model.weight, trained["weight"])
    assert not executed.exists()


def test_tensors_that_were_added_to_a_checkpoint(tmp_path: Path) -> None:
    """DCP reads every safetensors file of the folder."""
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / DIRECTORY_MANIFEST).write_text(json.dumps({"files": describe_files(tmp_path)}))
    resume.check_files(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected file \S+two\.safetensors in the checkpoint"):
        resume.check_files(tmp_path)


CODE: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}, "auto_map"),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, "auto_map"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
    ("config.json", {"_attn_implementation": "stranger/kernel"}, "never fetched"),
    ("config.json", {"attn_implementation": "stranger/kernel:flash"}, "never fetched"),
    ("config.json", {"_attn_implementation_internal": "stranger/kernel"}, "never fetched"),
    ("config.json", {"experts_implementation": "stranger/kernel"}, "never fetched"),
    ("config.json", {"model_type": "evil"}, "config.json cannot be used"),
]


@pytest.mark.parametrize(("file", "values", "said"), CODE)
def test_code_that_a_model_folder_names(
    entry: Entry, inputs: Path, executed: Path, monkeypatch: pytest.MonkeyPatch, file: str, values: Any, said: str
) -> None:
    module(inputs / "model", executed)
    monkeypatch.syspath_prepend(inputs / "model")
    edit(inputs / "model" / file, **values)
    assert_refused(entry(arguments(inputs, inputs / "out")), said)
    assert not executed.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        {"auto_mapping": {"parent_library": "evil", "base_model_class": "x"}, "use_dora": True},
        {"eva_config": {"rho": 2}},
        {"peft_type": "PROMPT_TUNING"},
        {"r": "eight"},
    ],
)
def test_code_that_an_adapter_names(
    adapter: Path, entry: Entry, inputs: Path, executed: Path, monkeypatch: pytest.MonkeyPatch, values: Any
) -> None:
    module(inputs, executed)
    monkeypatch.syspath_prepend(inputs)
    edit(adapter / "adapter_config.json", **values)
    assert_refused(entry(arguments(inputs, inputs / "out", f"model.lora_adapter_path={adapter}")), "adapter")
    assert not executed.exists()


def move_out(inputs: Path, name: str) -> Path:
    (inputs / "outside").mkdir(exist_ok=True)
    return (inputs / "model" / name).rename(inputs / "outside" / name)


def absolute_shard(inputs: Path) -> None:
    outside = move_out(inputs, "model.safetensors")
    edit(inputs / "model" / "model.safetensors.index.json", weight_map=dict.fromkeys(load_file(outside), str(outside)))


def shard_above(inputs: Path) -> None:
    names = load_file(move_out(inputs, "model.safetensors"))
    weight_map = dict.fromkeys(names, "../outside/model.safetensors")
    edit(inputs / "model" / "model.safetensors.index.json", weight_map=weight_map)


def linked(name: str) -> Callable[[Path], None]:
    return lambda inputs: (inputs / "model" / name).symlink_to(move_out(inputs, name))


LINKED = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize(
    "change", [absolute_shard, shard_above, *(linked(name) for name in LINKED)], ids=["absolute", "above", *LINKED]
)
def test_names_that_leave_the_model_folder(entry: Entry, inputs: Path, change: Callable[[Path], None]) -> None:
    change(inputs)
    assert_refused(entry(arguments(inputs, inputs / "out")), "outside")


@pytest.mark.parametrize("change", [absolute_shard, shard_above])
def test_names_that_leave_it_are_refused_even_where_links_are_followed(
    entry: Entry, inputs: Path, change: Callable[[Path], None]
) -> None:
    change(inputs)
    ended = entry(arguments(inputs, inputs / "out", "model.follow_links=true"))
    assert_refused(ended, "names a file outside itself")


def test_links_out_of_an_adapter(adapter: Path, entry: Entry, inputs: Path) -> None:
    outside = (adapter / "adapter_model.safetensors").rename(inputs / "outside")
    (adapter / "adapter_model.safetensors").symlink_to(outside)
    assert_refused(entry(arguments(inputs, inputs / "out", f"model.lora_adapter_path={adapter}")), "link out of")


def test_links_that_the_user_asks_for_are_followed(inputs: Path) -> None:
    for name in LINKED:
        linked(name)(inputs)
    out = inputs / "out"
    train_here(inputs, out, "model.follow_links=true", "trainer.total_training_steps=1", "data.val_files=null")
    assert json.loads((out / "run.json").read_text())["overridden"]["model.follow_links"] is True
    assert not (out / "model.safetensors").is_symlink()


def test_links_inside_a_snapshot_of_the_hub_s_cache_are_its_own(inputs: Path) -> None:
    snapshot_folder = inputs / "models--a--b" / "snapshots" / "c0ffee"
    blobs = inputs / "models--a--b" / "blobs"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((inputs / "model").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot_folder / path.name).symlink_to(blobs / str(number))
    more = ("trainer.total_training_steps=1", "data.val_files=null", f"model.partial_pretrain={snapshot_folder}")
    train_here(inputs, inputs / "out", *more)


@pytest.mark.parametrize("name", ["metrics.jsonl", "data_audit.json", "checkpoints", ".apollo-run.json.tmp"])
def test_links_inside_the_run_folder_are_not_followed(entry: Entry, inputs: Path, name: str) -> None:
    """A folder in /tmp, say, that somebody else has prepared."""
    out, victim = inputs / "out", inputs / "victim"
    out.mkdir()
    victim.write_text("mine")
    (out / "run.json").write_text('{"kind": "apollo-sft run", "status": "failed"}')
    (out / name).symlink_to(victim)
    assert_refused(entry(arguments(inputs, out)), f"{name} (a link)")
    assert victim.read_text() == "mine"


def test_pruning_leaves_links_and_what_is_not_ours(tmp_path: Path) -> None:
    elsewhere, ours = tmp_path / "elsewhere", tmp_path / "checkpoints"
    for folder in (elsewhere, ours / "step_000001", ours / "step_000002"):
        folder.mkdir(parents=True)
        (folder / DIRECTORY_MANIFEST).write_text("{}")
    (ours / "step_000000").symlink_to(elsewhere)
    (ours / "step_000003").mkdir()
    resume.prune(ours, 1)
    assert {path.name for path in ours.iterdir()} == {"step_000000", "step_000002", "step_000003"}
    assert (elsewhere / DIRECTORY_MANIFEST).is_file()


def test_a_checkpoint_that_others_can_write_is_warned_of(inputs: Path) -> None:
    out, notes = inputs / "out", list[str]()
    train_here(inputs, out, "trainer.total_training_steps=1", "data.val_files=null")
    assert resume.newest_checkpoint(out / "checkpoints", notes) is not None
    assert not notes
    [state] = (out / "checkpoints").glob("step_*/state.json")
    state.chmod(0o666)
    assert resume.newest_checkpoint(out / "checkpoints", notes) is not None
    assert "state.json can be written by every user" in notes[0]
    state.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(state, 12345, -1)
        resume.newest_checkpoint(out / "checkpoints", notes)
        assert "belongs to another user (id 12345)" in notes[1]


def header(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


def one_tensor(size: int, begin: int, end: int) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}}).encode()
    return header(len(text), text)


BOMBS = {
    "a header of a terabyte": header(10**12, b"{}"),
    "a header above the limit": header(100_000_001, b" " * 64),
    "a header too deep": header(200_000, b"[" * 200_000),
    "a tensor larger than the file": one_tensor(10**9, 0, 4 * 10**9),
    "offsets that lie": one_tensor(2, -8, 0),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_headers_that_lie(entry: Entry, inputs: Path, content: bytes) -> None:
    (inputs / "model" / "model.safetensors").write_bytes(content)
    ended = entry(arguments(inputs, inputs / "out"))
    assert_refused(ended, "model.safetensors")
    assert ended.seconds < 10


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_json_that_is_too_deep(entry: Entry, inputs: Path, name: str) -> None:
    (inputs / "model" / name).write_text('{"a":' * 100_000)
    assert_refused(entry(arguments(inputs, inputs / "out")), "model")


def test_an_embedding_larger_than_any_memory(entry: Entry, inputs: Path) -> None:
    edit(inputs / "model" / "config.json", vocab_size=10**12)
    ended = entry(arguments(inputs, inputs / "out"))
    assert_refused(ended, "shape")
    assert ended.seconds < 10
