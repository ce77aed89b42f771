"""Compare what a model folder does with a prompt with training: tokenizer, template, stop tokens, a few replies.

Training does not come here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from itertools import islice
from typing import Any

import numpy as np

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder.lookup import trained_stops
from apollo_sft.data.read.conversation import needed_columns, parse_row
from apollo_sft.data.read.rows import read_rows
from apollo_sft.data.render.message_forms import CallStyle, with_call_form
from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.spans import Span, Text
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.errors import CheckpointError, DataError, ModelError
from apollo_sft.model.generate import generate_replies, load_for_generation, render_prompt
from apollo_sft.model.load import in_short
from apollo_sft.tools.export import probed_stops
from apollo_sft.tools.handoff.subject import Subject, WrongError
from apollo_sft.train.base_model import load_tokenizer
from apollo_sft.types import IGNORE_INDEX, Conversation, Sample

COMPARED_ROWS = 16
GENERATED = 4
LONGEST_REPLY = 512
"""Tokens that a reply may have where the data have no longer one."""
CONTEXT = 20
"""Characters that are shown on each side of a difference."""


def check_tokenizer(subject: Subject) -> str:
    """Check that the tokenizer loads, and that the model has an embedding for every token that can occur."""
    try:
        tokenizer = load_tokenizer(subject.folder, subject.trust_remote_code)
    except ModelError as error:
        raise WrongError("tokenizer_fails", str(error).replace("\n", " "), "copy the base model's tokenizer") from error

    subject.tokenizer = tokenizer
    rows = subject.hf_config.get_text_config().vocab_size
    above = [token for token, number in tokenizer.get_vocab().items() if number >= rows]
    if above:
        # Special tokens that nothing uses do no harm: they never occur in a prompt.
        named = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token}
        unused = set(tokenizer.all_special_tokens) - named
        is_note = all(token in unused and token not in str(tokenizer.chat_template) for token in above)
        what = f"{len(above)} tokens, {above[0]} among them, have no row in the {rows:,} embeddings"
        raise WrongError("vocab_mismatch", what, "use the tokenizer that belongs to the model", is_note)

    return f"{len(tokenizer):,} tokens, {rows:,} embeddings"


def check_template(subject: Subject) -> str:
    """Check that the chat template renders prompts of the training data as training rendered them.

    Text is compared byte for byte, and the tokens with those that were trained on.
    """
    tokenizer = subject.tokenizer
    if not tokenizer.chat_template:
        raise WrongError(
            "missing_template", "the tokenizer has no chat template", "export again, or copy chat_template.jinja"
        )

    try:
        subject.prompts = [render_prompt(tokenizer, "1 + 1?")]
    except Exception as error:  # a stranger's template
        raise WrongError("template_fails", in_short(error), "export again, or copy chat_template.jinja") from error

    if not subject.files:
        return "there is one; no training data to compare prompts on (--data FILE)"
    if subject.data.custom_cls.path is not None:
        return "there is one; rows of data.custom_cls are not compared"

    trained, whose = _trained_tokenizer(subject)
    renderer = Renderer(trained, resolve_template(trained, subject.data), subject.data)
    prompts: list[str] = []
    compared = 0
    for conversation, style, text, sample in _rendered(subject, renderer):
        rendered = [_compare(subject, style, conversation, text, span) for span in _opening_spans(conversation, text)]
        _compare_tokens(subject, conversation, sample, rendered)
        subject.longest_reply = max(subject.longest_reply, sample.num_targets)
        prompts += rendered[:1]
        compared += len(rendered)

    subject.prompts = prompts or subject.prompts
    return f"{compared} prompts of {len(prompts)} samples as training rendered them, by {whose}"


def check_stops(subject: Subject) -> str:
    """Check that generation_config.json stops where training ended replies, and that all files agree on it."""
    tokenizer = subject.tokenizer
    try:
        stated = publish.read_json(subject.folder / "generation_config.json").get("eos_token_id")
    except CheckpointError as error:
        raise WrongError("damaged_json", str(error).replace("\n", " "), "copy or export the folder again") from error

    ids = _as_list(stated)
    by_template = probed_stops(tokenizer, resolve_template(tokenizer, subject.data), subject.data)
    trained = trained_stops(subject.run)
    if trained is None:
        trained = by_template

    fix = f'generation_config.json: "eos_token_id": {list(trained)}'
    absent = [token for token in trained if token not in ids]
    if not ids or absent:
        found = f"generation_config.json stops at {_shown(tokenizer, ids)}, training at {_shown(tokenizer, trained)}"
        raise WrongError("wrong_stop_ids", found, fix)

    # Besides the trained stops only control tokens may end a reply: an ordinary one would cut replies short.
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ordinary = [token for token in ids if token not in trained and token not in control]
    if ordinary:
        raise WrongError("wrong_stop_ids", f"replies would end at an ordinary {_shown(tokenizer, ordinary)}", fix)
    if by_template and not set(by_template) & set(trained):
        found = f"the template ends replies with {_shown(tokenizer, by_template)}, not {_shown(tokenizer, trained)}"
        raise WrongError("wrong_stop_ids", found, "export again: template and stop ids come from two trainings")

    _check_eos(subject, ids, trained)
    if not trained:
        raise WrongError(
            "no_stop_trained", "the template writes no stop token", "train with a template that does", True
        )

    return f"{_shown(tokenizer, ids)}"


def check_generation(subject: Subject) -> str | None:
    """Check that greedy replies to some prompts end with a stop token. Return None when it is not wanted."""
    if not subject.generate:
        return None

    most = LONGEST_REPLY // 2
    if subject.max_new_tokens:
        most = subject.max_new_tokens
    elif subject.longest_reply:
        most = min(LONGEST_REPLY, 2 * subject.longest_reply + CONTEXT)

    try:
        model, tokenizer = load_for_generation(subject.folder, subject.trust_remote_code)
        replies = generate_replies(model, tokenizer, subject.prompts[:GENERATED], most, GENERATED)
    except (OSError, ValueError, RuntimeError, KeyError, ModelError) as error:
        raise WrongError("model_fails", in_short(error), "export or copy the folder again") from error

    stopped = sum(reply.stopped for reply in replies)
    if not stopped:
        raise WrongError(
            "does_not_stop",
            f"none of {len(replies)} greedy replies ended within {most} tokens: {replies[0].text[:40]!r} …",
            "train longer; or --max-new-tokens, where replies are longer",
        )

    return f"{stopped} of {len(replies)} greedy replies ended by a stop token within {most} tokens"


def _as_list(stated: Any) -> list[Any]:
    """Return the ids of a key that may be one id, a list, or absent."""
    if stated is None:
        return []
    if isinstance(stated, list):
        return stated
    return [stated]


def _check_eos(subject: Subject, ids: list[int], trained: tuple[int, ...]) -> None:
    """Check that the end tokens of tokenizer and config.json are among the `ids` of generation_config.json."""
    tokenizer = subject.tokenizer
    # config.json may have none; the tokenizer may not.
    of_config = [("config.json", number) for number in _as_list(subject.config.get("eos_token_id"))]
    for name, number in [("the tokenizer", tokenizer.eos_token_id), *of_config]:
        if number not in ids and not (name == "config.json" and number is None):
            shown = "none"
            if number is not None:
                shown = _shown(tokenizer, [number])
            found = f"the end token of {name} is {shown}, and generation_config.json has {_shown(tokenizer, ids)}"
            raise WrongError(
                "eos_differs", found, f"one end token in all three files: {_shown(tokenizer, trained or ids)}"
            )

    if trained and tokenizer.eos_token_id not in trained:
        raise WrongError(
            "eos_is_not_the_stop",
            f"replies were trained to end at {_shown(tokenizer, trained)}, the tokenizer's is {tokenizer.eos_token}",
            "TRL finds the end by the tokenizer's eos_token; verl and vLLM by generation_config.json",
            is_note=True,
        )


def _shown(tokenizer: Any, ids: list[int] | tuple[int, ...]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ids) or "nothing"


def _trained_tokenizer(subject: Subject) -> tuple[Any, str]:
    """Return the tokenizer that training used, where the base model is still here; else the folder's own."""
    own = subject.tokenizer, "the folder's own tokenizer (the base model is not here)"
    if subject.base is None:
        return own

    try:
        tokenizer = load_tokenizer(subject.base, subject.trust_remote_code)
        fit_template(tokenizer, subject.data, add=True)  # as model.add_special_tokens did, if any were missing
        return tokenizer, "the base model's tokenizer"
    except (ModelError, DataError):
        return own


def _rendered(subject: Subject, renderer: Renderer) -> Iterator[tuple[Conversation, CallStyle, Text, Sample]]:
    """Yield rows of the data as training rendered them, without those that it refused."""
    columns = needed_columns(subject.data)
    for ref, row in islice(read_rows(subject.files, columns), COMPARED_ROWS):
        try:
            conversation = parse_row(row, ref, subject.data)
            (samples,) = renderer.render([conversation])
        except DataError:
            continue
        with renderer.sandbox.bounded():
            layout = renderer.layouts.lay_out(conversation)
        for text, sample in zip(layout.texts, samples, strict=True):
            yield conversation, layout.style, text, sample


def _opening_spans(conversation: Conversation, text: Text) -> list[Span]:
    """Return the first span of every trained reply whose prompt has the same text at inference."""
    first: dict[int, Span] = {}
    for span in text.spans:
        first.setdefault(span.turn, span)
    roles = [message["role"] for message in conversation.messages]
    return [span for span in first.values() if roles[span.turn] == "assistant" and not span.rewritten]


def _compare(subject: Subject, style: CallStyle, conversation: Conversation, text: Text, span: Span) -> str:
    """Return the prompt of one reply by the folder's tokenizer, as RL renders it. Raises: WrongError."""
    messages = [with_call_form(message, style) for message in conversation.messages[: span.turn]]
    day = datetime.combine(date.fromisoformat(subject.data.template_date), time())
    kwargs = {"strftime_now": lambda form: day.strftime(form)} | conversation.template_kwargs
    expected = text.text[: span.start]

    # Without the arguments that training gave the template first: RL may not give them.
    attempts: list[Mapping[str, Any]] = [{}]
    given = dict(subject.data.apply_chat_template_kwargs) | text.arguments
    if given:
        attempts.append(given)

    rendered: list[str] = []
    for more in attempts:
        try:
            prompt = render_prompt(subject.tokenizer, messages, {**kwargs, **more}, conversation.tools)
        except Exception as error:  # a stranger's template
            raise WrongError("template_fails", f"{conversation.ref}: {in_short(error)}", "export again") from error
        if prompt == expected or (span.lacks_prefill and prompt.startswith(expected)):
            if more:
                what = "prompts are as in training only with these template arguments"
                raise WrongError("template_kwargs", what, f"give RL the same: {given}", is_note=True)
            return prompt
        rendered.append(prompt)

    found = rendered[0]
    shorter = min(len(expected), len(found))
    at = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
    shown = slice(max(0, at - CONTEXT), at + CONTEXT)
    raise WrongError(
        "template_differs",
        f"{conversation.ref}, character {at} of the prompt: {expected[shown]!r} in training, {found[shown]!r} here",
        "export again, so that the folder has the template of the training; or give the data.… keys of the training",
    )


def _compare_tokens(subject: Subject, conversation: Conversation, sample: Sample, prompts: list[str]) -> None:
    """Check that RL gives the model the same tokens as training, up to the first target. Raises: WrongError."""
    targets = np.flatnonzero(sample.labels != IGNORE_INDEX)
    if not prompts or not len(targets):
        return

    trained = sample.input_ids[: targets[0] + 1].tolist()
    fed = subject.tokenizer(prompts[0], add_special_tokens=False)["input_ids"]
    if fed[: len(trained)] != trained:
        raise WrongError(
            "tokens_differ",
            f"{conversation.ref}: the prompt is {len(fed)} other tokens than the {len(trained)} of the training",
            "use the base model's tokenizer files",
        )
