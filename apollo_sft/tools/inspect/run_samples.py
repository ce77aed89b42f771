"""Show samples that a run has trained on, in its report: from its tokenised data, if those still exist."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import ApolloError
from apollo_sft.report.document import Passages
from apollo_sft.tools.inspect.inspection import at_random, usual
from apollo_sft.tools.inspect.inspection_document import sample_passage
from apollo_sft.train.base_model import load_tokenizer

DRAWN = 2
SEED = 1


def trained_samples(folder: Path, audit: Mapping[str, Any], config: Mapping[str, Any]) -> Passages | None:
    """Return a usual sample and some drawn at random; None, and a line on stderr why, where they cannot be shown.

    `audit`: of the training data. `config`: dotted key -> value.
    """
    try:
        store = SampleStore(Path(str(audit["store"])))
        tokenizer = _tokenizer(folder, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"apollo-sft: no trained samples: the tokenised data cannot be opened ({error})", file=sys.stderr)
        return None
    except ApolloError as error:
        print(f"apollo-sft: no trained samples: {error}", file=sys.stderr)
        return None

    drawn = [replace(pick, why="drawn at random") for pick in at_random(store, DRAWN, SEED)]
    picks = {pick.index: pick for pick in [*drawn, *usual(store)]}
    passages = [sample_passage(store, pick, tokenizer) for pick in picks.values()]
    return Passages("Samples that were trained on", passages[::-1])


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    """Open the tokenizer of the trained model, or that of its base model. Code of a folder is not run."""
    *others, last = _tokenizer_folders(folder, config)
    for place in others:
        if (place / "tokenizer_config.json").is_file():
            return load_tokenizer(place, trust_remote_code=False)
    return load_tokenizer(last, trust_remote_code=False)


def _tokenizer_folders(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folders where the tokenizer may be, the best first."""
    yield folder
    yield from (folder / "adapter", folder / "checkpoints" / "latest" / "hf")
    yield Path(str(config.get("model.partial_pretrain", folder)))
