"""What would fail late is refused before a weight is read: exit code 2 and one message that names it."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from tests.support.entry import Entry, assert_refused
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.reliability import record
from tests.support.runs import arguments, write_inputs

Change = Callable[[Path, pytest.MonkeyPatch], Any]


@dataclass(frozen=True)
class Late:
    """A run that would fail late: what the user asks for, what is wrong with the inputs, what has to be said."""

    name: str
    said: tuple[str, ...]
    more: tuple[str, ...] = ()
    change: Change = lambda inputs, patch: None


def edit(file: str, **values: Any) -> Change:
    def change(inputs: Path, patch: pytest.MonkeyPatch) -> None:
        path = inputs / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def remove(*files: str) -> Change:
    def change(inputs: Path, patch: pytest.MonkeyPatch) -> None:
        for file in files:
            (inputs / file).unlink()

    return change


def train_rows(**columns: list[Any]) -> Change:
    return lambda inputs, patch: pq.write_table(pa.table(columns), inputs / "train.parquet")


def write(file: str, text: str) -> Change:
    return lambda inputs, patch: (inputs / file).write_text(text)


def truncate(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    path = inputs / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def other_model(**changes: Any) -> Change:
    return lambda inputs, patch: save_tiny_model(inputs / "model", tiny_config(**({"vocab_size": 360} | changes)))


def pickled(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    (inputs / "model" / "model.safetensors").rename(inputs / "model" / "pytorch_model.bin")


def adapter_of_another_base(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    save_tiny_model(inputs / "other", tiny_config(vocab_size=360, hidden_size=64))
    save_tiny_adapter(inputs / "other").rename(inputs / "adapter")


def without_package(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("apollo_sft.report.sinks.importlib.util.find_spec", lambda name: None)


def without_cuda(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.cuda.is_available", lambda: False)


def without_key(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HOME", str(inputs))
    patch.chdir(inputs)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_CONFIG_DIR", "NETRC"):
        patch.delenv(name, raising=False)


def a_stranger_s_folder(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    (inputs / "out").mkdir()
    (inputs / "out" / "thesis.tex").write_text("years of work")


def a_file_in_the_way(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    (inputs / "out").write_text("")


def another_run(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.claim(inputs / "out", "auto", {})
    folder.write_run("failed")
    folder.write_config("optim: {lr: 0.5}\n")
    folder.metrics.write_text('{"step": 1}\n')
    folder.release()


def one_of_two(address: str, port: int) -> Callable[[pytest.MonkeyPatch], None]:
    def set_variables(patch: pytest.MonkeyPatch) -> None:
        names = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
        for name, value in (names | {"MASTER_ADDR": address, "MASTER_PORT": port}).items():
            patch.setenv(name, str(value))

    return set_variables


TAKEN = socket.socket()
"""A port that is in use for as long as this module is."""


def taken_port(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    TAKEN.bind(("127.0.0.1", 0))
    TAKEN.listen()
    one_of_two("127.0.0.1", TAKEN.getsockname()[1])(patch)


def no_room(inputs: Path, patch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    fields = 11

    def nearly_full(path: Any) -> os.statvfs_result:
        found = real(path)
        return os.statvfs_result([*list(found)[:3], 3, 3, *list(found)[5:fields]])

    patch.setattr(os, "statvfs", nearly_full)


NAME = "a run that would fail late, refused before the model is loaded"
LONG = ["one two three four five six"] * 8
LATE = [
    Late("a misspelt key", ("unknown key data.max_lenght", "data.max_length"), ("data.max_lenght=64",)),
    Late("a wrong type", ("optim.lr", "a number"), ("optim.lr=fast",)),
    Late("no such file", ("data.train_files: no such file", "nothing.parquet"), ("data.train_files=nothing.parquet",)),
    Late("not parquet", ("train.parquet: not a readable parquet file",), (), write("train.parquet", '{"question": 1}')),
    Late("a truncated file", ("train.parquet: not a readable parquet file",), (), truncate),
    Late("a missing column", ("no column 'quest'", "data.prompt_key=question"), ("data.prompt_key=quest",)),
    Late(
        "a column of numbers",
        ("2 of 2 rows", "column answer", "int", "train.parquet row 0"),
        (),
        train_rows(question=["a", "b"], answer=[1, 2]),
    ),
    Late("a null cell", ("row 1, column answer", "null"), (), train_rows(question=["a", "b"], answer=["a", None])),
    Late("no row", ("data.train_files: there is no row",), (), train_rows(question=pa.array([], "string"), answer=[])),
    Late(
        "no target left",
        ("no row has a token to train on", "data.max_length="),
        ("data.max_length=4", "data.truncation=right"),
        train_rows(question=LONG, answer=LONG),
    ),
    Late("rows too long", ("rows are longer than data.max_length",), ("data.max_length=4",)),
    Late("too few positions", ("data.max_length is above", "256"), ("data.max_length=257",)),
    Late("ids without embedding", ("no embedding",), (), other_model(vocab_size=97)),
    Late("no chat template", ("no chat template", "chatml"), (), remove("model/chat_template.jinja")),
    Late("a template that refuses", ("template fails",), ("data.chat_template={{ raise_exception('never') }}",)),
    Late("no end token", ("end token",), ("data.chat_template=plain",), edit("tokenizer_config.json", eos_token=None)),
    Late("no tokenizer", ("no tokenizer",), (), remove("model/tokenizer.json", "model/tokenizer_config.json")),
    Late("only pickled weights", ("pytorch_model.bin", "pickled weights are not read"), (), pickled),
    Late("no weights", ("no weights that can be loaded",), (), remove("model/model.safetensors")),
    Late("weights of another shape", ("shape",), (), edit("config.json", intermediate_size=64)),
    Late(
        "a layer too many",
        ("weights that the base's files do not",),
        (),
        edit("config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
    ),
    Late("quantised weights", ("quantised",), (), edit("config.json", quantization_config={"quant_method": "gptq"})),
    Late("an unknown architecture", ("config.json",), (), edit("config.json", model_type="newest")),
    Late(
        "an architecture that mixes documents",
        ("Mamba", "cannot be trained exactly"),
        (),
        write("model/config.json", '{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}'),
    ),
    Late("no LoRA target", ("model.target_modules", "q_porj"), ("model.lora_rank=2", "model.target_modules=[q_porj]")),
    Late("no adapter", ("adapter",), ("model.lora_adapter_path=nowhere",)),
    Late(
        "an adapter of another base",
        ("the adapter of another model",),
        ("model.lora_adapter_path=INPUTS/adapter",),
        adapter_of_another_base,
    ),
    Late(
        "no such layer", ("names no module",), ("model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[Layer]",)
    ),
    Late("flash attention on a CPU", ("needs CUDA",), ("model.attn_implementation=flash",)),
    Late(
        "4 bits where there is no CUDA",
        ("model.load_in_4bit=true needs CUDA", "the device cpu"),
        ("trainer.device=auto", "model.lora_rank=2", "model.load_in_4bit=true"),
        without_cuda,
    ),
    Late("another number of processes", ("trainer.n_gpus_per_node",), ("trainer.n_gpus_per_node=3",)),
    Late("ranks that do not divide", ("ulysses_sequence_parallel_size",), ("ulysses_sequence_parallel_size=2",)),
    Late("a logger without its package", ("pip install",), ("trainer.logger=[tensorboard]",), without_package),
    Late("wandb without a key", ("wandb login", "WANDB_MODE=offline"), ("trainer.logger=[wandb]",), without_key),
    Late("a stranger's folder", ("not from a run of ours", "thesis.tex"), (), a_stranger_s_folder),
    Late("a file in the way", ("is not a folder",), (), a_file_in_the_way),
    Late("a folder that cannot be written", ("cannot be written",), ("trainer.default_local_dir=/proc/apollo/out",)),
    Late("a full disk", ("no room", "bytes free"), (), no_room),
    Late("a run of another configuration", ("another configuration", "optim.lr"), (), another_run),
    Late("no step to train", ("no step to train",), ("data.drop_last=true", "data.train_batch_size=64")),
    Late("a port in use", ("cannot meet", "MASTER_PORT"), (), taken_port),
    Late(
        "a rendezvous for everybody",
        ("MASTER_ADDR=0.0.0.0", "127.0.0.1"),
        (),
        lambda inputs, patch: one_of_two("0.0.0.0", 1)(patch),
    ),
]


@pytest.mark.parametrize("late", LATE, ids=lambda late: late.name.replace(" ", "-"))
def test_refused_before_the_model_is_loaded(
    late: Late, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    late.change(tmp_path, monkeypatch)
    entry = Entry(capfd, monkeypatch)
    more = [text.replace("INPUTS", str(tmp_path)) for text in late.more]
    ended = entry(arguments(tmp_path, tmp_path / "out", *more))
    record(NAME, trials=1, failures=ended.code != 2 or "Traceback" in ended.said, worst_seconds=ended.seconds)
    assert_refused(ended, *late.said)


def test_the_check_sees_a_run_that_gets_to_the_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Entry(capfd, monkeypatch)(arguments(write_inputs(tmp_path), tmp_path / "out"))
    assert ended.code == 1
    assert "AssertionError: the weights were read" in ended.said
