r"""Find one turn as the model writes it at inference: the prompt before it, and the reply through its stop token.

At inference the model reads what the template makes of the messages before the turn, with a generation prompt. That is
the context, character by character. The reply is what the template writes for the turn's message. Mostly one rendering
holds both. Gemma 4 closes an empty block in the prompt that it writes in no reply, so two are joined:

    prompt       <|turn>user\n1 + 1?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>
    rendering    <|turn>user\n1 + 1?<turn|>\n<|turn>model\n2<turn|>\n
    turn         <|turn>user\n1 + 1?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>2<turn|>\n
"""

from __future__ import annotations

from dataclasses import replace

from apollo_sft.data.render.message_forms import has_reasoning
from apollo_sft.data.render.renderings import Renderings, Turn
from apollo_sft.data.render.sandbox import RenderError


def find_turn(renderings: Renderings, index: int, answers_only: bool = False) -> Turn:
    """Return message `index` as the model writes it at inference. `answers_only`: the target is behind the reasoning.

    Raises: UnprovableError, RenderError.
    """
    turn = _usual_turn(renderings, index)
    if turn is None:
        from apollo_sft.data.render.joined import find_unusual_turn

        turn = find_unusual_turn(renderings, index)

    if answers_only and has_reasoning(renderings.messages[index]):
        from apollo_sft.data.render.joined import answer_start

        return replace(turn, target_start=max(turn.start, answer_start(turn)))
    return turn


def _usual_turn(renderings: Renderings, index: int) -> Turn | None:
    """Return a reply whose rendering begins with its prompt, as nearly all do; None for any other message."""
    # Before the first message nobody has asked anything.
    if index == 0 or renderings.messages[index]["role"] != "assistant":
        return None
    try:
        prompt = renderings.prompt(index)
        rendering = renderings.text(index + 1)
    except RenderError:
        return None

    if not rendering.startswith(prompt) or not prompt.endswith(renderings.format.usual_prompt(renderings.arguments)):
        return None
    return Turn.at_end(renderings, index, prompt, rendering[len(prompt) :])
