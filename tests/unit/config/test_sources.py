import re
import shlex
from pathlib import Path

import pytest
import yaml

from apollo_sft.config.compose import compose, to_yaml, validate
from apollo_sft.config.schema import SftConfig
from apollo_sft.config.sources import named, paths_of
from apollo_sft.errors import ConfigError

PLAIN = "data.val_files=null"


def composed(files: str, *more: str) -> SftConfig:
    return compose([f"data.train_files={files}", *(more or [PLAIN])]).config


def names(files: str) -> list[str]:
    return list(named(composed(files).data.train_files))


def test_the_example_of_the_reference_is_read() -> None:
    data = composed("[{path:a.parquet,weight:2,name:math},{path:b.parquet,max_samples:1000}]").data
    assert paths_of(data.train_files) == ("a.parquet", "b.parquet")
    first, second = named(data.train_files).items()
    assert (first[0], first[1].weight, first[1].max_samples) == ("math", 2.0, None)  # type: ignore[union-attr]
    assert (second[0], second[1].weight, second[1].max_samples) == ("b", None, 1000)  # type: ignore[union-attr]


def test_a_path_may_be_a_list_and_a_single_source_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    data = composed("{path: ['~/a.parquet', $HOME/b.parquet], max_samples: 3}").data
    assert paths_of(data.train_files) == ("/home/ann/a.parquet", "/home/ann/b.parquet")
    assert list(named(data.train_files)) == ["a"]


def test_paths_alone_stay_one_set_of_data_as_they_always_were() -> None:
    data = composed("[a.parquet,b.parquet]").data
    assert data.train_files == paths_of(data.train_files) == ("a.parquet", "b.parquet")
    assert named(data.train_files) == {}
    assert composed("a.parquet").data.train_files == ("a.parquet",)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("[{path: x/a.parquet}, x/b.jsonl.gz, s3://bucket/c/]", ["a", "b", "c"]),
        ("[{path: 'data/math/*.parquet'}, {path: 'data/v1.5'}]", ["math", "v1.5"]),
        ("[{path: m/train.parquet}, {path: n/train.parquet}, n/test.parquet]", ["m_train", "n_train", "test"]),
        ("[{path: x/m/train.parquet}, {path: y/m/train.parquet}]", ["x_m_train", "y_m_train"]),
        ("[{path: a.parquet, name: b}, {path: c/b.parquet}]", ["b", "c_b"]),
        ("[{path: 'übung 1.parquet'}, {path: '*.parquet'}]", ["-bung-1", "data"]),
    ],
)
def test_a_source_without_a_name_is_called_after_its_place(files: str, expected: list[str]) -> None:
    assert names(files) == expected


def test_what_is_saved_beside_a_run_is_read_again() -> None:
    config = composed(
        "[{path:a.parquet,weight:2,name:math},{path:b.parquet,max_samples:9}]", "data.val_files=[{path:v}]"
    )
    assert validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("[{path: a, weight: 0}]", ["data.train_files[0].weight", "greater than 0"]),
        ("[a, {path: a, weight: -2}]", ["data.train_files[1].weight", "greater than 0"]),
        ("[{path: a, weight: nan}]", ["data.train_files[0].weight", "finite"]),
        ("[{path: a, weight: true}]", ["data.train_files[0].weight", "a number"]),
        ("[{path: a, max_samples: 0}]", ["data.train_files[0].max_samples", "1"]),
        ("[{path: a, max_samples: 1.5}]", ["data.train_files[0].max_samples", "whole number"]),
        ("[{path: a, weights: 1}]", ["unknown key data.train_files[0].weights", "path, name, weight, max_samples"]),
        ("[{weight: 1}]", ["data.train_files[0].path"]),
        ("[{path: []}]", ["data.train_files[0].path", "a list of 1 or more"]),
        ("[{path: a, name: 'a/b'}]", ["data.train_files[0].name", "letters"]),
        ("[{path: a, weight: 1, max_samples: 2}]", ["data.train_files[0] has both weight and max_samples"]),
        ("[{path: a, weight: 1}, b]", ["data.train_files[1] has neither weight nor max_samples", "b"]),
        ("[{path: a, name: x}, {path: b, name: x}]", ["2 sources are called x"]),
        ("[{path: a.parquet}, a.parquet]", ["2 sources are called a"]),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(files: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        composed(files)
    assert all(word in str(refused.value) for word in words), refused.value


def test_every_example_of_the_page_is_read() -> None:
    """As the shell hands it over, and the yaml as it stands."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "mixtures.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    words = [word for block in blocks for word in shlex.split(block) if word.startswith("data.")]
    assert len(words) == 5
    for word in words:
        key = word.partition("=")[0]
        config = compose([word, *([] if key == "data.val_files" else [PLAIN])]).config
        assert named(config.data.val_files if key == "data.val_files" else config.data.train_files)
    (tree,) = (yaml.safe_load(block) for block in blocks if block.startswith("data:"))
    defaults = composed("a.parquet").model_dump(mode="json")
    data = validate(defaults | {"data": defaults["data"] | tree["data"]}).data
    assert list(named(data.train_files)) == ["math", "a"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["data.train_max_samples=5", PLAIN], ["data.train_max_samples counts over all files", "max_samples of each"]),
        (
            ["data.custom_cls.path=x.py", "data.custom_cls.name=X", PLAIN],
            ["data.train_files has sources", "custom_cls"],
        ),
        (["data.val_files=[{path: v, weight: 1}]"], ["unknown key data.val_files[0].weight", "path, name"]),
        (["data.val_files=[{path: v}]", "data.val_max_samples=5"], ["data.val_max_samples", "smaller files"]),
    ],
)
def test_keys_that_do_not_go_with_sources_are_refused(more: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        composed("[{path: a}, {path: b}]", *more)
    assert all(word in str(refused.value) for word in words), refused.value
