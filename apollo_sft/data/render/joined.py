"""Find a turn whose rendering does not begin with a usual prompt, by its values and its role header. See `turns`.

Only some templates and conversations need this: prompts that close a block which no reply has, messages that are
written otherwise once others follow, greetings, two replies in a row, templates that refuse a part of a conversation.
"""

from __future__ import annotations

import re
from typing import Any

from apollo_sft.data.render.message_forms import split_reasoning
from apollo_sft.data.render.renderings import Renderings, Turn, UnprovableError
from apollo_sft.data.render.reply_format import MARK, MARKUP, OTHER_MARK, ReplyFormat
from apollo_sft.data.render.sandbox import RenderError
from apollo_sft.data.render.text_search import before_cut_token, common_length
from apollo_sft.types import REASONING_KEYS, Message

PIECE = re.compile(rf"{MARKUP.pattern}|\w+|.", re.DOTALL)
"""What a header is compared by, so that no tag and no word is cut in two."""


def find_unusual_turn(renderings: Renderings, index: int) -> Turn:
    """Return message `index` as the model writes it at inference. Raises: UnprovableError, RenderError."""
    end = renderings.first_readable(index + 1)
    rendering = renderings.text(end)
    if renderings.messages[index]["role"] != "assistant":
        start = _values_start(renderings, index, rendering, end)
        return _turn(renderings, index, end, rendering[:start], rendering[start:])

    prompt = _prompt(renderings, index)
    if prompt is not None and rendering.startswith(prompt):
        start = len(prompt) + _header_length(renderings, index, prompt, rendering[len(prompt) :], end)
        return _turn(renderings, index, end, rendering[:start], rendering[start:])
    return _joined(renderings, index, end, prompt)


def answer_start(turn: Turn) -> int:
    """Return the character of `turn.text` at which the answer starts, behind the reasoning."""
    renderings = turn.renderings
    message = renderings.messages[turn.index]
    _, answer = split_reasoning(message.get("content") or "")
    if answer is not None:
        # The reasoning stands in the content, as the template writes it.
        return turn.text.rfind(answer.strip(), turn.start)

    rendering = renderings.text(turn.num_messages)
    without = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    marked = _marked(without, _mark_for(rendering))
    changed = renderings.changed(turn.index, message | marked, turn.num_messages)
    behind = len(rendering) - common_length(rendering, changed)
    return len(turn.text) + len(turn.rest) - behind


def _prompt(renderings: Renderings, index: int) -> str | None:
    """Return the prompt before message `index`, None where the template writes none for these messages."""
    if index == 0:
        # Nobody has written anything, so the model is not asked: a greeting stands in the conversation from the start.
        return None
    try:
        return renderings.prompt(index)
    except RenderError:
        return None


def _header_length(renderings: Renderings, index: int, prompt: str, reply: str, end: int) -> int:
    """Return the length of the role header at the start of `reply`, where the prompt lacks it.

    Some templates append no generation prompt behind a message of the assistant.
    """
    usual = renderings.format.usual_prompt(renderings.arguments)
    if prompt.endswith(usual) or prompt != _text_before(renderings, index):
        return 0
    longest = _values_start(renderings, index, prompt + reply, end) - len(prompt)
    return _common_header(usual, reply[:longest])


def _joined(renderings: Renderings, index: int, end: int, prompt: str | None) -> Turn:
    """Return a turn whose rendering does not begin with its prompt: the reply is found by its role header.

    Raises: UnprovableError, RenderError.
    """
    rendering = renderings.text(end)
    appended = _appended(renderings, index, prompt)
    longest = _values_start(renderings, index, rendering, end)
    start = longest
    length = 0
    if appended.strip():
        start, length = find_header(appended, rendering, content_end(renderings, index - 1, rendering, end), longest)
        if not appended[:length].strip():
            raise UnprovableError(index, "the template does not begin this reply as its generation prompt does")

    reply = rendering[start:]
    if prompt is None:
        return _turn(renderings, index, end, rendering[:start], reply)
    prefill = appended[length:]
    if renderings.format.is_closed(appended, prefill):
        return _turn(renderings, index, end, prompt, reply)

    # The prompt opens a block that this reply does not continue. Behind the opening it would be read as reasoning.
    context = prompt.removesuffix(prefill)
    return _turn(renderings, index, end, context, reply, lacks_prefill=True)


def _appended(renderings: Renderings, index: int, prompt: str | None) -> str:
    """Return the generation prompt before message `index`, or the usual one where there is none."""
    before = _text_before(renderings, index)
    if prompt is not None and before is not None:
        cut = before_cut_token((before, prompt), common_length(before, prompt), renderings.format.control_tokens)
        if prompt[cut:].strip():
            return prompt[cut:]
    return renderings.format.usual_prompt(renderings.arguments)


def _text_before(renderings: Renderings, index: int) -> str | None:
    """Return the rendering of the messages before `index`, None where the template refuses them."""
    try:
        return renderings.text(index)
    except RenderError:
        return None


def find_header(header: str, text: str, earliest: int, latest: int) -> tuple[int, int]:
    """Return the character at which the longest beginning of `header` in `text[earliest:latest]` ends, and its length.

    Without one it is (latest, 0).
    """
    best = (latest, 0)
    first = PIECE.match(header)
    if first is None:
        return best

    at = text.find(first.group(), earliest, latest)
    while at >= 0:
        length = _common_header(header, text[at:latest])
        if length >= best[1]:
            best = (at + length, length)
        at = text.find(first.group(), at + 1, latest)
    return best


def _common_header(header: str, text: str) -> int:
    """Return the length of the longest beginning of `header`, in whole pieces, that `text` begins with."""
    length = 0
    for match in PIECE.finditer(header):
        if not text.startswith(match.group(), length):
            break
        length = match.end()
    return length


def _turn(renderings: Renderings, index: int, end: int, context: str, reply: str, lacks_prefill: bool = False) -> Turn:
    """Return the turn of a context and a reply, which is cut at its stop.

    `end`: the number of messages in the rendering that ends with `reply`.
    """
    if end == index + 1:
        return Turn.at_end(renderings, index, context, reply, lacks_prefill)
    rendering = renderings.text(end)
    values_end = _values_end(renderings, index, rendering, end) - len(rendering) + len(reply)
    target = _through_next_stop(reply, values_end, renderings.format)
    return Turn.of_parts(renderings, (index, end), context, target, reply[len(target) :], lacks_prefill)


def _through_next_stop(reply: str, values_end: int, reply_format: ReplyFormat) -> str:
    """Return a reply that other messages follow, through the first control token behind its values."""
    found = [(reply.find(token, values_end), -len(token), token) for token in reply_format.control_tokens]
    behind = [place for place in found if place[0] >= 0]
    if not behind:
        return reply.rstrip()
    at, _, token = min(behind)
    if reply_format.has_stop:
        return reply[: at + len(token)]
    return reply[:at].rstrip()


def _values_start(renderings: Renderings, index: int, rendering: str, end: int) -> int:
    """Return the character at which other values of the message change the rendering. Raises: UnprovableError."""
    marked = renderings.changed(index, _marked(renderings.messages[index], _mark_for(rendering)), end)
    start = common_length(rendering, marked)
    if start == len(rendering):
        raise UnprovableError(index, "the template does not write the content of the turn")
    return before_cut_token((rendering, marked), start, renderings.format.control_tokens)


def _values_end(renderings: Renderings, index: int, rendering: str, end: int) -> int:
    """Return the character behind which no value of the message changes the rendering."""
    marked = renderings.changed(index, _marked(renderings.messages[index], _mark_for(rendering)), end)
    longest = min(len(rendering), len(marked)) - common_length(rendering, marked)
    return len(rendering) - min(common_length(rendering[::-1], marked[::-1]), longest)


def content_end(renderings: Renderings, index: int, rendering: str, end: int) -> int:
    """Return the character at which the content of message `index` ends, or of the last one before it that is written.

    0 where none is written.
    """
    for earlier in range(index, -1, -1):
        # Something is appended, as templates look at how a content begins (`<tool_response>`).
        message = renderings.messages[earlier]
        longer = message | {"content": (message.get("content") or "") + _mark_for(rendering)}
        marked = renderings.changed(earlier, longer, end)
        if marked != rendering:
            return common_length(rendering, marked)
    return 0


def _mark_for(text: str) -> str:
    """Return a mark that does not occur in a text."""
    if MARK in text:
        return OTHER_MARK
    return MARK


def _marked(message: Message, mark: str) -> Message:
    """Return a message with `mark` in the place of its content, its reasoning, and the names and arguments of calls."""
    marked = message | {key: mark for key in ("content", *REASONING_KEYS) if message.get(key)}
    if not message.get("content") and "tool_calls" not in message:
        marked["content"] = mark
    if "tool_calls" in message:
        marked["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
    return marked


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    function: dict[str, Any] = call.get("function", call)
    arguments: Any = {mark: mark}
    if isinstance(function.get("arguments"), str):
        arguments = f'{{"{mark}": "{mark}"}}'
    marked = function | {"name": mark, "arguments": arguments}
    if "function" in call:
        return call | {"function": marked}
    return marked
