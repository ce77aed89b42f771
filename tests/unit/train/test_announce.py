import pytest
import yaml

from apollo_sft.config.compose import compose, known_keys
from apollo_sft.train.announce import LINE_WIDTH, config_text, padded_heads
from tests.support.models import tiny_config

OPEN_DICT = "data.apply_chat_template_kwargs"


def halves(*arguments: str) -> tuple[list[str], list[str]]:
    """The lines below both titles."""
    composed = compose(["model.partial_pretrain=base", *arguments])
    lines = config_text(composed.config, composed.overridden).splitlines()
    [middle] = [index for index, line in enumerate(lines) if line.startswith("Left at the defaults")]
    assert lines[0] == "Set on the command line:"
    return lines[1:middle], lines[middle:]


def keys(given: list[str], defaults: list[str]) -> list[str]:
    """All that is shown, under whole names."""
    found, section = [line.strip().partition("=")[0] for line in given], ""
    for line in defaults[1:]:
        section = line[2:11].strip() or section
        for item in line[11:].split("  "):
            if item:
                name = item.partition("=")[0]
                found.append(f"{section}.{name}" if f"{section}.{name}" in known_keys() else name)
    return found


def test_every_key_is_shown_once_and_what_was_set_comes_first() -> None:
    given, defaults = halves("optim.lr=4e-5", "data.val_files=null", "+data.response_dict_keys=['answer']")
    assert given == [
        "  data.val_files=[]",
        "  data.response_dict_keys=[answer]",
        "  model.partial_pretrain=base",
        "  optim.lr=4.0e-05",
    ]
    assert sorted(keys(given, defaults)) == sorted(known_keys())


def test_it_says_where_all_of_it_is() -> None:
    given, defaults = halves("trainer.default_local_dir=~/runs/one")
    assert "~" not in "".join(given)
    assert defaults[0].endswith("/runs/one/config.yaml):")


def test_defaults_stand_close_and_fit_80_columns() -> None:
    _, defaults = halves()
    assert LINE_WIDTH == 80
    assert max(len(line) for line in defaults[1:]) <= LINE_WIDTH
    assert len(defaults) < 48


def test_of_a_section_that_was_set_as_a_dict_only_what_it_holds_counts_as_set() -> None:
    given, defaults = halves("data.multiturn={enable: true}")
    assert "  data.multiturn.enable=true" in given
    assert not any("multiturn.enable=" in line for line in defaults)
    assert any("multiturn.tools_key=tools" in line for line in defaults)


@pytest.mark.parametrize("argument", [f"{OPEN_DICT}={{enable_thinking: false}}", f"{OPEN_DICT}.enable_thinking=false"])
def test_keys_of_the_user_are_shown(argument: str) -> None:
    given, defaults = halves(argument)
    assert f"  {OPEN_DICT}.enable_thinking=false" in given
    assert not any("apply_chat_template_kwargs" in line for line in defaults)


def test_values_read_back_as_what_they_are() -> None:
    given, _ = halves("trainer.project_name='true'", "data.prompt_key='1'", "trainer.logger=[console,wandb]")
    values = {line.strip().partition("=")[0]: yaml.safe_load(line.partition("=")[2]) for line in given}
    assert values["trainer.project_name"] == "true"
    assert values["data.prompt_key"] == "1"
    assert values["trainer.logger"] == ["console", "wandb"]


def test_a_long_text_takes_one_line() -> None:
    template = "{% for message in messages %}\n{{ message.content }}\n{% endfor %}" * 50
    given, _ = halves(f"data.chat_template={template}")
    [line] = [line for line in given if "chat_template" in line]
    assert line.startswith('  data.chat_template="{% for message in messages %}\\n{{')
    assert len(line) < 500
    assert line.endswith("characters)")


@pytest.mark.parametrize(
    ("heads", "sp_size", "line"),
    [
        (14, 4, "14 heads padded to 16 for sp 4: attention costs 1.14x"),
        (9, 2, "9 heads padded to 10 for sp 2: attention costs 1.11x"),
        (14, 2, None),
        (14, 1, None),
    ],
)
def test_padded_heads_are_said_with_their_cost(heads: int, sp_size: int, line: str | None) -> None:
    config = tiny_config("Qwen2", num_attention_heads=heads, num_key_value_heads=1, hidden_size=8 * heads)
    assert padded_heads(config, sp_size) == line
