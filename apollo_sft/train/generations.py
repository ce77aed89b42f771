"""`trainer.generate_samples`: what the model that is being trained says to the prompts of the first validation rows.

Greedy, by plain forwards of the sharded model on all ranks together, without a cache: what is trained is what speaks.
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
from apollo_sft.train.strategy import strategy_of
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample

MAX_NEW_TOKENS = 128
"""Each costs a forward over all prompts."""
ASKED = 0
"""A label that only marks the position whose next token is wanted."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids`: up to where the first trained reply of a row begins. `text`, `expected`: it, and that reply, as text."""

    ref: RowRef
    ids: tuple[int, ...]
    text: str
    expected: str


def first_prompts(store: SampleStore, tokenizer: Any, number: int) -> list[Prompt]:
    """Of the first rows of the store, of each its first trained reply."""
    prompts: dict[RowRef, Prompt] = {}
    for index in range(len(store)):
        if len(prompts) == number:
            break
        sample = store[index]
        is_target = target_mask(sample)
        if sample.ref in prompts or not is_target.any():
            continue
        first = int(np.argmax(is_target))
        end = first + int(np.argmin(np.append(is_target[first:], False)))
        ids = tuple(sample.input_ids[:first].tolist())
        if ids:
            text, expected = (decoded(tokenizer, sample.input_ids, *span) for span in ((0, first), (first, end)))
            prompts[sample.ref] = Prompt(sample.ref, ids, text, expected)
    return list(prompts.values())


def position_limit(hf_config: Any) -> int | None:
    """Tokens that a text of this model may have; None is no limit that the config names."""
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return min((n for n in (positions, longest_exact_document(hf_config)) if n is not None), default=None)


@torch.no_grad()
def continuations(
    model: SftModel,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    world: World,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]] | None:
    """The most likely token after each prompt, again and again, until one of `stops`, MAX_NEW_TOKENS or `limit` in all.

    Collective: every rank gives the same prompts and gets the same tokens. `stopped` is asked after each token, as in
    `evaluate`: None when it says so.
    """
    model.eval()
    texts = [list(prompt) for prompt in prompts]
    open_ones = list(range(len(texts)))
    interrupted = False
    for _ in range(MAX_NEW_TOKENS):
        open_ones = [i for i in open_ones if limit is None or len(texts[i]) < limit]
        if not open_ones or (interrupted := stopped()):
            break
        found = _next_tokens(model, [texts[i] for i in open_ones], world)
        for i, token in zip(open_ones, found, strict=True):
            texts[i].append(token)
        open_ones = [i for i in open_ones if texts[i][-1] not in stops]
    model.train()
    strategy_of(model).reshard(model)
    return None if interrupted else [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _next_tokens(model: SftModel, texts: Sequence[Sequence[int]], world: World) -> list[int]:
    """One forward over all texts in one pack. A rank knows those that end in its slice; the others tell it theirs."""
    micro_batch = pack([_asking(text) for text in texts], model.sp_size)
    ends = np.cumsum([len(text) for text in texts]) - 1
    width = micro_batch.input_ids.shape[1] // model.sp_size
    mine = torch.from_numpy(np.flatnonzero(ends // width == model.sp_rank)).to(world.device)
    known = torch.full((len(texts),), -1, dtype=torch.int64, device=world.device)
    known[mine] = model.next_tokens(micro_batch, world.device)
    if world.size > 1:  # data ranks have all found the same; were one to differ, all would go on with one of the two
        dist.all_reduce(known, op=dist.ReduceOp.MAX)
    return [int(token) for token in known.tolist()]


def _asking(text: Sequence[int]) -> Sample:
    labels = np.full(len(text), IGNORE_INDEX, dtype=np.int32)
    labels[-1] = ASKED
    return Sample(np.asarray(text, dtype=np.int32), labels, RowRef("", 0), ())


def generations_of(number: int, prepared: Prepared, world: World) -> Generations:
    """Return the prompts of the first `number` validation rows with a trained reply, for this run."""
    prompts: list[Prompt] = []
    if prepared.val is not None:
        prompts = first_prompts(prepared.val, prepared.tokenizer, number)
    stops = frozenset(end_tokens(prepared.base, prepared.train.summary.stop_tokens))
    return Generations(prompts, prepared.tokenizer, stops, world, position_limit(prepared.hf_config))


class Generations:
    """The prompts of a run, and what the model says to them."""

    def __init__(
        self, prompts: Sequence[Prompt], tokenizer: Any, stops: frozenset[int], world: World, limit: int | None
    ) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._stops = stops
        self._world = world
        self._limit = limit

    def replies(self, model: SftModel, stopped: Callable[[], bool]) -> list[dict[str, Any]]:
        """A line of samples.jsonl for each prompt, without its step; none when a signal stopped it. Collective."""
        ids = [prompt.ids for prompt in self._prompts]
        found = continuations(model, ids, self._stops, self._world, self._limit, stopped) if ids else None
        return [self._line(prompt, new) for prompt, new in zip(self._prompts, found or (), strict=found is not None)]

    def _line(self, prompt: Prompt, new: Sequence[int]) -> dict[str, Any]:
        is_whole = bool(new) and new[-1] in self._stops
        said = list(new[:-1] if is_whole else new)
        line = {
            "row": str(prompt.ref),
            "prompt": prompt.text,
            "expected": prompt.expected,
            "text": self._tokenizer.decode(said, skip_special_tokens=True),
            "stopped": is_whole,
            "tokens": len(new),
        }
        return redact(line)
