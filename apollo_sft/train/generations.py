"""`trainer.generate_samples`: replies of the model that is being trained to the prompts of the first validation rows.

Greedy, by plain forwards of the sharded model on all ranks together, without a cache: the tokens come from the very
model that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from apollo_sft.checkpoint.model_folder.sidecars import end_tokens
from apollo_sft.data.batch.loader import pack
from apollo_sft.data.store.audit import decoded, target_mask
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model.load import longest_exact_document
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.redact import redact
from apollo_sft.train.prepare_run import Prepared
from apollo_sft.train.signals import not_stopped
from apollo_sft.train.strategy import strategy_of
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample

MAX_NEW_TOKENS = 128
"""Each costs a forward over all prompts."""
WANTED = 0
"""A label that only marks the position whose next token is wanted."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginning of a row, up to its first trained reply."""

    ref: RowRef

    ids: tuple[int, ...]
    """The tokens up to where the reply begins."""

    text: str
    """The same as text."""

    expected: str
    """The reply of the row as text."""


def first_prompts(store: SampleStore, tokenizer: Any, number: int) -> list[Prompt]:
    """Return the prompts of the first `number` rows of the store that have a trained reply."""
    prompts: dict[RowRef, Prompt] = {}
    for index in range(len(store)):
        if len(prompts) == number:
            break
        sample = store[index]
        is_target = target_mask(sample)
        if sample.ref in prompts or not is_target.any():
            continue

        # A row may have several replies: the prompt ends before the first one.
        first = int(np.argmax(is_target))
        end = first + int(np.argmin(np.append(is_target[first:], False)))
        ids = tuple(sample.input_ids[:first].tolist())
        if ids:
            text = decoded(tokenizer, sample.input_ids, 0, first)
            expected = decoded(tokenizer, sample.input_ids, first, end)
            prompts[sample.ref] = Prompt(sample.ref, ids, text, expected)
    return list(prompts.values())


def position_limit(hf_config: Any) -> int | None:
    """Return the number of tokens that a text of this model may have; None where its config names no limit."""
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return min((n for n in (positions, longest_exact_document(hf_config)) if n is not None), default=None)


@torch.no_grad()
def continuations(
    model: SftModel,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    world: World,
    limit: int | None = None,
    stopped: Callable[[], bool] = not_stopped,
) -> list[list[int]] | None:
    """Return greedy continuations: each ends with one of `stops`, after MAX_NEW_TOKENS, or at `limit` tokens in all.

    Collective: every rank gives the same prompts and gets the same tokens. `stopped` is called before each token, as
    in `evaluate`: None is returned when it returns true.
    """
    model.eval()
    texts = [list(prompt) for prompt in prompts]
    unfinished = list(range(len(texts)))
    interrupted = False
    for _ in range(MAX_NEW_TOKENS):
        unfinished = [i for i in unfinished if limit is None or len(texts[i]) < limit]
        if not unfinished:
            break
        interrupted = stopped()
        if interrupted:
            break

        found = _next_tokens(model, [texts[i] for i in unfinished], world)
        for i, token in zip(unfinished, found, strict=True):
            texts[i].append(token)
        unfinished = [i for i in unfinished if texts[i][-1] not in stops]

    # Also after a stop: the state that is saved next is gathered from the shards.
    model.train()
    strategy_of(model).reshard(model)
    if interrupted:
        return None
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _next_tokens(model: SftModel, texts: Sequence[Sequence[int]], world: World) -> list[int]:
    """Return the most likely next token of each text, by one forward over all of them in one pack."""
    micro_batch = pack([_labelled(text) for text in texts], model.sp_size)

    # With sequence parallelism a rank holds a slice of the pack, and finds the tokens of the texts that end there.
    ends = np.cumsum([len(text) for text in texts]) - 1
    width = micro_batch.input_ids.shape[1] // model.sp_size
    mine = torch.from_numpy(np.flatnonzero(ends // width == model.sp_rank)).to(world.device)
    known = torch.full((len(texts),), -1, dtype=torch.int64, device=world.device)
    known[mine] = model.next_tokens(micro_batch, world.device)
    # Data ranks have all found the same token. If one differs after all, the ranks still continue with one token.
    if world.size > 1:
        dist.all_reduce(known, op=dist.ReduceOp.MAX)
    return [int(token) for token in known.tolist()]


def _labelled(text: Sequence[int]) -> Sample:
    """Return a text as a sample whose only label marks its last token."""
    labels = np.full(len(text), IGNORE_INDEX, dtype=np.int32)
    labels[-1] = WANTED
    return Sample(np.asarray(text, dtype=np.int32), labels, RowRef("", 0), ())


def generations_of(number: int, prepared: Prepared, world: World) -> Generations:
    """Return the prompts of the first `number` validation rows with a trained reply, for this run."""
    prompts: list[Prompt] = []
    if prepared.val is not None:
        prompts = first_prompts(prepared.val, prepared.tokenizer, number)
    stops = frozenset(end_tokens(prepared.base, prepared.train.summary.stop_tokens))
    return Generations(prompts, prepared.tokenizer, stops, world, position_limit(prepared.hf_config))


class Generations:
    """The prompts of a run, and the model's replies to them."""

    def __init__(
        self, prompts: Sequence[Prompt], tokenizer: Any, stops: frozenset[int], world: World, limit: int | None
    ) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._stops = stops
        self._world = world
        self._limit = limit

    def replies(self, model: SftModel, stopped: Callable[[], bool]) -> list[dict[str, Any]]:
        """Return a line of samples.jsonl for each prompt, without its step; none after a stop. Collective."""
        if not self._prompts:
            return []
        ids = [prompt.ids for prompt in self._prompts]
        found = continuations(model, ids, self._stops, self._world, self._limit, stopped)
        if found is None:
            return []
        return [self._line(prompt, new) for prompt, new in zip(self._prompts, found, strict=True)]

    def _line(self, prompt: Prompt, new: Sequence[int]) -> dict[str, Any]:
        has_stopped = bool(new) and new[-1] in self._stops
        reply = list(new)
        if has_stopped:
            reply.pop()  # the stop token is no part of the text, and not every tokenizer counts it as special
        line = {
            "row": str(prompt.ref),
            "prompt": prompt.text,
            "expected": prompt.expected,
            "text": self._tokenizer.decode(reply, skip_special_tokens=True),
            "stopped": has_stopped,
            "tokens": len(new),
        }
        return redact(line)
