import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from apollo_sft.data.render.render import Renderer, shifted_labels, truncate
from apollo_sft.data.render.template import ChatTemplate, resolve_template
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, RowRef, Sample
from tests.support.data import CHATML, CLOSING, FORGETFUL, STARTING, UNSTOPPED, chat, data_config, tiny_tokenizer

REF = RowRef("f.parquet", 7)
THINK = "<think>\n\n</think>\n\n"
RETURNING = CHATML.replace("<|im_end|>", "{{ eos_token if loop.last and not add_generation_prompt else '<|im_end|>' }}")
"""Like gpt-oss: the last turn has an end mark of its own."""

MOVING = CHATML.replace(
    "{{ message['content'] }}",
    "{{ 'T' if message == messages|selectattr('role', 'eq', 'user')|list|last }}{{ message['content'] }}",
)
"""Like Mistral's: the tools stand in the user's last message."""


def renderer(template: str, tokenizer: Any = None, **changes: Any) -> Renderer:
    tokenizer = tokenizer or tiny_tokenizer()
    data = data_config(chat_template=template, **changes)
    return Renderer(tokenizer, resolve_template(tokenizer, data), data)


def found_in(one: Renderer) -> Counter[str]:
    """How often each finding was counted."""
    return Counter({name: tally.count for name, tally in one.counts.findings.items()})


def render(messages: list[Any], template: str = CHATML, **changes: Any) -> Sample:
    [[sample]] = renderer(template, **changes).render([Conversation(messages, None, {}, REF)])
    return sample


def target_texts(sample: Sample) -> list[str]:
    """The decoded text of each stretch of targets."""
    tokenizer = tiny_tokenizer()
    texts, ids = [], []
    for label in [*sample.labels.tolist(), IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            ids.append(label)
        elif ids:
            texts.append(tokenizer.decode(ids))
            ids = []
    return texts


def test_labels_are_shifted_once_by_hand() -> None:
    ids = np.array([10, 11, 12, 13, 14, 15], dtype=np.int32)
    x = IGNORE_INDEX
    assert shifted_labels(ids, [(2, 4)]).tolist() == [x, 12, 13, x, x, x]
    assert shifted_labels(ids, [(1, 2), (4, 6)]).tolist() == [11, x, x, 14, 15, x]
    assert shifted_labels(ids, [(0, 2)]).tolist() == [11, x, x, x, x, x]
    assert shifted_labels(ids, [(0, 1)]).tolist() == [x] * 6


def test_a_whole_sample_by_hand() -> None:
    tokenizer = tiny_tokenizer()
    sample = render(chat("ab", "c"))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt = [start, *encode("user\nab"), end, *encode("\n"), start, *encode("assistant\n")]
    assert sample.input_ids.tolist() == [*prompt, *encode("c"), end, *encode("\n")]
    assert sample.labels.tolist() == [IGNORE_INDEX] * (len(prompt) - 1) + [
        *encode("c"),
        end,
        IGNORE_INDEX,
        IGNORE_INDEX,
    ]
    assert (sample.input_ids.dtype, sample.labels.dtype) == (np.int32, np.int32)
    assert (sample.turns, sample.ref, sample.num_targets) == ((1,), REF, 2)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, chat("a", "b"), ["b<|im_end|>"]),
        (CHATML, chat("a", "b", "c", "d"), ["b<|im_end|>", "d<|im_end|>"]),
        (CHATML, chat("a", "b", "c"), ["b<|im_end|>"]),
        (CHATML, chat("a", ""), ["<|im_end|>"]),
        (CHATML, chat("b", "b", "assistant\nb", "b"), ["b<|im_end|>", "b<|im_end|>"]),
        (CHATML, chat("a", "b")[1:], None),
        (CHATML, [*chat("a", "b"), {"role": "assistant", "content": "c"}], ["b<|im_end|>", "c<|im_end|>"]),
        (CHATML, chat("a", "b \n"), ["b \n<|im_end|>"]),
        (CLOSING, chat("a", "b"), ["b<|end|>\n<|endoftext|>"]),
        (CLOSING, chat("a", "b", "c", "d"), ["b<|end|>", "d<|end|>\n<|endoftext|>"]),
        (CLOSING, chat("a", "", "c", ""), ["<|end|>", "<|end|>\n<|endoftext|>"]),
        (CLOSING.replace("eos_token", "'<|im_start|>'"), chat("a", "b"), ["b<|end|>"]),
        (STARTING, chat("a", "b", "c", "d"), ["b<|user|>", "d"]),
        (STARTING, chat("a", "b", "c"), ["b<|user|>"]),
        (UNSTOPPED, chat("a", "b", "c", "d"), ["b", "d"]),
        ("plain", chat("a", "b", "c", "d"), ["b<|endoftext|>", "d<|endoftext|>"]),
        ("chatml", chat("a", "b"), ["b<|im_end|>"]),
    ],
)
def test_targets_are_what_the_model_says_through_its_stop_token(
    template: str, messages: list[Any], expected: list[str] | None
) -> None:
    sample = render(messages, template)
    assert target_texts(sample) == (expected or ["b<|im_end|>"])
    tokenizer = tiny_tokenizer()
    text = resolve_template(tokenizer, data_config(chat_template=template)).text
    whole = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=True, return_dict=False)
    assert sample.input_ids.tolist() == whole


def test_template_arguments_decide_what_is_prompt() -> None:
    thinking_off = {"enable_thinking": False}
    assert target_texts(render(chat("a", "b"), FORGETFUL, apply_chat_template_kwargs=thinking_off)) == ["b<|im_end|>"]
    row = Conversation(chat("a", "b"), None, thinking_off, REF)
    [[sample]] = renderer(FORGETFUL).render([row])
    assert target_texts(sample) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "kwargs", "said"),
    [
        ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{{ '<|user|>' if add_generation_prompt }}",
         chat("a", "b"), {}, ("turn 1", "does not begin this reply as its generation prompt does")),
        ("{{ messages[0].content }}{{ '<|user|>' if add_generation_prompt }}", chat("a", "b"), {},
         ("turn 1", "does not write the content")),
        ("{{ raise_exception('roles must alternate') }}", chat("a", "b"), {}, ("fails", "roles must alternate")),
    ],
)  # fmt: skip
def test_what_cannot_be_proven_is_refused(
    template: str, messages: list[Any], kwargs: Any, said: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        render(messages, template, apply_chat_template_kwargs=kwargs)
    message = str(caught.value)
    assert "f.parquet row 7" in message
    assert "data.chat_template (jinja text)" in message
    assert all(words in message for words in said)


def test_one_bad_conversation_leaves_the_others() -> None:
    strict = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    rows = [Conversation(chat("a", "b", "c", "d")[: 2 * n], None, {}, REF) for n in (1, 2, 1)]
    results = renderer(strict).try_render(rows)
    assert [isinstance(result, DataError) for result in results] == [False, True, False]
    assert results[0].samples[0].input_ids.tolist() == results[2].samples[0].input_ids.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "history", "expected"),
    [
        (FORGETFUL, "expand", [[THINK + "b<|im_end|>"], [THINK + "d<|im_end|>"]]),
        (FORGETFUL, "last_turn", [[THINK + "d<|im_end|>"]]),
        (FORGETFUL, "as_rendered", [["b<|im_end|>", THINK + "d<|im_end|>"]]),
        (CHATML, "last_turn", [["b<|im_end|>", "d<|im_end|>"]]),
        (RETURNING, "expand", [["b<|endoftext|>"], ["d<|endoftext|>"]]),
        (RETURNING, "last_turn", [["d<|endoftext|>"]]),
        (MOVING, "expand", [["b<|im_end|>"], ["d<|im_end|>"]]),
        (MOVING, "as_rendered", [["b<|im_end|>", "d<|im_end|>"]]),
    ],
)
def test_templates_that_rewrite_history(template: str, history: str, expected: list[list[str]]) -> None:
    """Each turn as inference would produce it, in the fewest samples; or what `data.history` asks for instead."""
    one = renderer(template, history=history, thinking="all")
    [samples] = one.render([Conversation(chat("a", "b", "c", "d"), None, {}, REF)])
    assert [target_texts(sample) for sample in samples] == expected
    left_out = 2 - sum(len(texts) for texts in expected)
    assert found_in(one)["turns_left_out"] == left_out
    assert found_in(one)["expanded_rows"] == (len(samples) > 1)
    rewritten = history == "as_rendered"
    assert found_in(one)["rewritten_turns"] == rewritten


def test_turns_of_one_step_share_a_sample() -> None:
    """Like Qwen3's tool calls: only what the user said last decides what is rewritten."""
    template = FORGETFUL.replace(
        "loop.last", "(messages[loop.index0 + 1:] | selectattr('role', 'eq', 'user') | list == [])"
    )
    messages = [
        *chat("a", "b"),
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "c"},
        *chat("d", "e"),
    ]
    [samples] = renderer(template, thinking="all").render([Conversation(messages, None, {}, REF)])
    assert [target_texts(sample) for sample in samples] == [
        [THINK + "b<|im_end|>", THINK + "c<|im_end|>"],
        [THINK + "e<|im_end|>"],
    ]
    assert [sample.turns for sample in samples] == [(1, 3), (5,)]


def test_a_prompt_with_an_opening_that_no_reply_has() -> None:
    """Like R1's: the prompt ends with `<think>`, a reply is written without. It is trained behind the role header."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<the>\n{% endif %}")
    for reply in ("b", "<them", "", "<the>\nb"):
        one = renderer(template)
        [[sample]] = one.render([Conversation(chat("a", reply), None, {}, REF)])
        opened = reply.startswith("<the>\n")
        assert target_texts(sample) == [reply.removeprefix("<the>\n") + "<|im_end|>"]
        assert found_in(one)["unopened_turns"] == (not opened)


def prompts_hold(messages: list[Any], template: str) -> tuple[int, int]:
    """Assert that the ids before every target are those of its prompt; (turns that were cut, whole ids equal)."""
    tokenizer = tiny_tokenizer()
    text = resolve_template(tokenizer, data_config(chat_template=template)).text
    one = renderer(template, tokenizer)
    [[sample]] = one.render([Conversation(messages, None, {}, REF)])
    ids = sample.input_ids.tolist()
    apply = lambda m, **kw: tokenizer.apply_chat_template(m, chat_template=text, return_dict=False, **kw)  # noqa: E731
    starts = np.flatnonzero((sample.labels != IGNORE_INDEX) & (np.roll(sample.labels, 1) == IGNORE_INDEX)) + 1
    for turn, start in zip(sample.turns, starts, strict=True):
        prompt = apply(messages[:turn], add_generation_prompt=True)
        if turn == sample.turns[0]:
            assert ids[:start] == prompt
        assert tokenizer.decode(ids[:start]) == tokenizer.decode(prompt)
    assert tokenizer.decode(ids) == apply(messages, tokenize=False)
    return found_in(one)["cut_turns"], ids == apply(messages)


@pytest.mark.parametrize("template", [CHATML, "plain", UNSTOPPED])
def test_hostile_seams_are_cut_as_inference_does(template: str) -> None:
    """Replies and prompts that fuse at the seam: white space, letters of one word, emoji, combining marks."""
    draw = random.Random(0)
    bits = ["\n", " ", "  ", "\n\n", "a", "the", " answer", "é", "e\u0301", "\u0301", "👩‍👧", "二", "assistant\n", "."]
    cut = same = 0
    for _ in range(150):
        texts = ["".join(draw.choices(bits, k=draw.randint(1, 5))) for _ in range(2)]
        if not texts[1].strip():
            continue
        turns, equal = prompts_hold(chat(*texts), template)
        cut, same = cut + turns, same + equal
        assert equal or turns
    assert cut > 5
    assert same > 5


def test_a_token_over_the_seam_is_cut_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    seam = tokenizer("assistant\n\n\n", add_special_tokens=False)["input_ids"]
    assert len(seam) < len(tokenizer("assistant\n")["input_ids"]) + len(tokenizer("\n\n")["input_ids"])
    assert prompts_hold(chat("a", "\n\nb"), CHATML) == (1, False)
    assert prompts_hold(chat("a", "b"), CHATML) == (0, True)


def test_a_prompt_whose_tokens_change_without_a_straddle_is_cut_too() -> None:
    """`\\n\\n` is one token at the end of a text, two before a letter: nothing straddles, yet the prompt is another."""
    tokenizer = tiny_tokenizer()
    alone = tokenizer("a\n\n")["input_ids"]
    assert tokenizer("a\n\nb")["input_ids"][: len(alone)] != alone
    assert prompts_hold(chat("a\n\n", "b"), "plain") == (1, False)


def test_targets_at_position_0_are_counted_not_trained() -> None:
    one = renderer("plain")
    [[sample]] = one.render([Conversation(chat("", "b"), None, {}, REF)])
    assert sample.num_targets == 1
    assert found_in(one)["unpredictable_targets"] == 1


def test_counts() -> None:
    one = renderer(UNSTOPPED)
    one.render([Conversation(chat("a", "b", "c", ""), None, {}, REF)])
    assert (one.counts.turns, found_in(one)) == (1, {"turns_without_stop": 2, "empty_replies": 1, "blank_turns": 1})
    examples = {name: tally.examples for name, tally in one.counts.findings.items()}
    assert examples == {key: [str(REF)] for key in ("turns_without_stop", "empty_replies", "blank_turns")}
    two = renderer(CHATML)
    two.render([Conversation(chat("a", "b", "c", "d"), None, {}, REF)] * 2)
    assert two.counts.stop_tokens == {tiny_tokenizer().convert_tokens_to_ids("<|im_end|>"): 4}


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="fast tokenizer"):
        Renderer(Slow(), ChatTemplate(CHATML, "test"), data_config())


@pytest.mark.parametrize("length", [1, 5, 8, 9, 100])
def test_truncation_cuts_tokens_and_labels_together(length: int) -> None:
    x = IGNORE_INDEX
    whole = Sample(np.arange(9, dtype=np.int32), np.array([x, x, 3, 4, x, x, 7, 8, x], np.int32), REF, (1, 3))
    for side in ("left", "right"):
        cut = truncate(whole, length, side)
        kept = min(length, 9)
        assert len(cut.input_ids) == len(cut.labels) == kept
        assert cut.labels[-1] == x
        trained = cut.labels[:-1] != x
        assert (cut.labels[:-1][trained] == cut.input_ids[1:][trained]).all()
    assert truncate(whole, 8, "right").labels.tolist() == [x, x, 3, 4, x, x, 7, x]
    assert truncate(whole, 5, "left").labels.tolist() == [x, x, 7, 8, x]
    assert truncate(whole, 9, "left") is whole


def test_left_cuts_keep_bos_which_predicts_nothing() -> None:
    x = IGNORE_INDEX
    whole = Sample(np.arange(9, dtype=np.int32), np.array([1, 2, 3, 4, x, 6, 7, 8, x], np.int32), REF, (1, 3))
    cut = truncate(whole, 4, "left", bos=0)
    assert (cut.input_ids.tolist(), cut.labels.tolist()) == ([0, 6, 7, 8], [x, 7, 8, x])
    assert (cut.input_ids.dtype, cut.labels.dtype) == (np.int32, np.int32)
    assert truncate(whole, 4, "left", bos=5).input_ids.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("train_on", "untrained", "expected"),
    [
        ("assistant", set(), ["b<|im_end|>", "d<|im_end|>"]),
        ("assistant", {1}, ["d<|im_end|>"]),
        ("last", set(), ["d<|im_end|>"]),
        ("last", {3}, []),
        ("assistant", {0, 1, 2, 3}, []),
        ("all", set(), ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>", "d<|im_end|>"]),
        ("all", {0, 3}, ["b<|im_end|>", "c<|im_end|>"]),
    ],
)
def test_which_turns_are_trained(train_on: str, untrained: set[int], expected: list[str]) -> None:
    row = Conversation(chat("a", "b", "c", "d"), None, {}, REF, frozenset(untrained))
    [[sample]] = renderer(CHATML, train_on=train_on).render([row])
    assert target_texts(sample) == expected


def test_text_that_spells_a_control_token() -> None:
    rows = [Conversation(chat("a", reply), None, {}, REF) for reply in ("so <|im_end|> it is", "b")]
    rows.append(Conversation(chat("a", "b"), [{"name": "<|im_start|>system"}], {}, REF))
    first, second, third = renderer(CHATML).try_render(rows)
    assert "message 1 spells <|im_end|>" in str(first)
    assert "data.special_tokens_in_content=drop" in str(first)
    assert "the tools spell <|im_start|>" in str(third)
    assert not isinstance(second, DataError)

    one = renderer(CHATML, special_tokens_in_content="drop")
    first, second, third = one.try_render(rows)
    assert [row.dropped for row in (first, second, third)] == [  # type: ignore[union-attr]
        "message 1 spells <|im_end|> (data.special_tokens_in_content=drop)",
        None,
        "the tools spell <|im_start|> (data.special_tokens_in_content=drop)",
    ]
    assert (one.counts.turns, found_in(one)) == (1, {"control_tokens_dropped": 2})

    one = renderer(CHATML, special_tokens_in_content="allow")
    assert target_texts(one.render(rows)[0][0]) == ["so <|im_end|> it is<|im_end|>"]
    assert found_in(one) == {"control_tokens": 2, "lost_parts": 1}


def test_the_date_that_a_template_prints_is_the_configured_one() -> None:
    template = "{{ strftime_now('%d %B %Y') }}" + CHATML
    [[sample]] = renderer(template, template_date="1999-12-31").render([Conversation(chat("a", "b"), None, {}, REF)])
    assert tiny_tokenizer().decode(sample.input_ids).startswith("31 December 1999<|im_start|>")


CALLING = [
    *chat("a"),
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\nBODY<|im_end|>\n{% endfor %}"
    + CHATML.partition("{% endfor %}")[2]
)


@pytest.mark.parametrize(
    ("body", "call"),
    [
        (
            "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.x }}{% endfor %}",
            "add1",
        ),
        ("{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}", "add"),
        (
            "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}",
            'add{"x": 1}',
        ),
        (
            "{% if m.content is none %}{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments }}"
            "{% else %}{{ m.content }}{% endif %}",
            'add{"x": 1}',
        ),
        ("{{ m.content }}", ""),
    ],
)
def test_tool_calls_get_the_form_that_the_template_writes(body: str, call: str) -> None:
    """Null or empty content, arguments as a dict or as JSON text: the first style in which the call is written."""
    one = renderer(CALLS.replace("BODY", body))
    [[sample], [again]] = one.render([Conversation(CALLING, None, {}, REF)] * 2)
    assert target_texts(sample) == target_texts(again) == [f"{call}<|im_end|>", "two<|im_end|>"]
    assert found_in(one)["unwritten_turns"] == (0 if call else 2)


def test_a_rendering_depends_on_its_row_alone() -> None:
    """The template takes arguments as JSON text of all functions but one, of which it writes a dict in its own way."""
    body = (
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
        "{% if c.function.name == 'add' %}{{ c.function.arguments }}"
        "{% else %}{{ '' + c.function.arguments }}{% endif %}{% endfor %}"
    )
    adding = Conversation(CALLING, None, {}, REF)
    multiplying = Conversation(json.loads(json.dumps(CALLING).replace("add", "mul")), None, {}, REF)
    expected = {"add": 'add{"x": 1}<|im_end|>', "mul": 'mul{"x": 1}<|im_end|>'}
    for rows in ([multiplying, adding], [adding, multiplying], [adding], [multiplying]):
        one = renderer(CALLS.replace("BODY", body))
        for row, [sample] in zip(rows, one.render(rows), strict=True):
            [call, _] = target_texts(sample)
            assert call == expected[call[:3]], row


def test_what_the_template_leaves_out_of_a_reply_is_counted() -> None:
    one = renderer(CHATML.replace("message['content']", "message['content'] | trim | replace('x', '')"))
    thinking = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    replies = [{"role": "assistant", "content": text} for text in (" b  c ", "xb")]
    one.render([Conversation([*chat("a"), reply], None, {}, REF) for reply in (*replies, thinking)])
    assert found_in(one) == {"unwritten_turns": 2}


TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ '\n' }}BODY"
    "{% endgeneration %}{% else %}{{ '\n' }}{{ m.content }}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = "{{ '<|im_end|>\n' }}"


@pytest.mark.parametrize(
    ("body", "expected", "found"),
    [
        ("{{ m.content }}" + END, ["b<|im_end|>", "d<|im_end|>"], {}),
        ("{{ m.content }}{% endgeneration %}{% generation %}" + END, ["b<|im_end|>", "d<|im_end|>"], {}),
        ("{{ m.content }}{% endgeneration %}" + END + "{% generation %}", ["b", "d"], {"turns_without_stop": 2}),
        (
            "{% endgeneration %}{% if m.content == 'b' %}b" + END + "{% else %}{% generation %}{{ m.content }}" + END
            + "{% endgeneration %}{% endif %}{% generation %}",
            ["d<|im_end|>"],
            {"unmarked_turns": 1},
        ),
    ],
)  # fmt: skip
def test_generation_tags_are_used_as_their_author_meant(body: str, expected: list[str], found: Any) -> None:
    one = renderer(TAGGED.replace("BODY", body))
    [[sample]] = one.render([Conversation(chat("a", "b", "c", "d"), None, {}, REF)])
    assert "".join(target_texts(sample)) == "".join(expected)
    assert found_in(one) == found


def test_generation_tags_that_mark_the_header_are_clipped_to_what_the_model_writes() -> None:
    template = TAGGED.replace("<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}{% generation %}", "START")
    start = "{% if m.role == 'assistant' %}{% generation %}<|im_start|>{{ m.role }}"
    template = template.replace("START", start).replace("{% else %}", "{% else %}<|im_start|>{{ m.role }}")
    one = renderer(template.replace("BODY", "{{ m.content }}" + END))
    [[sample]] = one.render([Conversation(chat("a", "b", "c", "d"), None, {}, REF)])
    assert target_texts(sample) == ["b<|im_end|>", "d<|im_end|>"]
    assert found_in(one) == {"clipped_marks": 2}


def test_a_template_of_parts_is_given_parts() -> None:
    parts = "{% for part in message['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    one = renderer(CHATML.replace("{{ message['content'] }}", parts))
    [[sample]] = one.render([Conversation(chat("a", "b", "c", "d"), None, {}, REF)])
    assert target_texts(sample) == ["b<|im_end|>", "d<|im_end|>"]
    assert sample.input_ids.tolist() == render(chat("a", "b", "c", "d")).input_ids.tolist()
    assert found_in(one) == {}


THINK_BY_REQUEST = FORGETFUL.replace("loop.last", "loop.last and not m.reasoning_content").replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
)


@pytest.mark.parametrize(
    ("thinking", "said", "expected"),
    [
        ("auto", {"content": "b"}, "b<|im_end|>"),
        ("all", {"content": "b"}, THINK + "b<|im_end|>"),
        ("none", {"content": "b"}, "b<|im_end|>"),
        ("auto", {"content": "b", "reasoning_content": "hm"}, "<think>\nhm\n</think>\n\nb<|im_end|>"),
        ("none", {"content": "b", "reasoning_content": "hm"}, "b<|im_end|>"),
        ("auto", {"content": "<think>\nhm\n</think>\n\nb"}, "<think>\nhm\n</think>\n\nb<|im_end|>"),
        ("all", {"content": "<think>hm</think>b"}, "<think>\nhm\n</think>\n\nb<|im_end|>"),
        ("none", {"content": "<think>\nhm\n</think>\n\nb"}, "b<|im_end|>"),
    ],
)
def test_what_is_trained_of_reasoning(thinking: str, said: dict[str, str], expected: str) -> None:
    one = renderer(THINK_BY_REQUEST, thinking=thinking)
    [[sample]] = one.render([Conversation([*chat("a"), {"role": "assistant"} | said], None, {}, REF)])
    assert target_texts(sample) == [expected]
    is_off = thinking != "all" and said == {"content": "b"}
    assert found_in(one)["thinking_off"] == is_off
    assert found_in(one)["unwritten_turns"] == 0
    text = tiny_tokenizer().decode(sample.input_ids)
    assert ("hm" in text) == (said != {"content": "b"}), "reasoning that is not trained is context"


def test_a_message_a_row_and_the_configuration_come_before_auto() -> None:
    silent = chat("a", "b")
    asked = {"enable_thinking": True}
    rows = [
        Conversation(silent, None, {}, REF, thinking={1: True}),
        Conversation(silent, None, asked, REF),
        Conversation(silent, None, asked, REF, thinking={1: False}),
    ]
    found = [target_texts(sample) for [sample] in renderer(THINK_BY_REQUEST).render(rows)]
    assert found == [[THINK + "b<|im_end|>"], [THINK + "b<|im_end|>"], ["b<|im_end|>"]]
    [[sample]] = renderer(THINK_BY_REQUEST, apply_chat_template_kwargs=asked).render(
        [Conversation(silent, None, {}, REF)]
    )
    assert target_texts(sample) == [THINK + "b<|im_end|>"]
