"""What preparing a dataset costs beside tokenising it with transformers alone: rows/s of both on one core.

    python bench/prepare.py --tokenizer FOLDER [--template FILE] [--rows N] [--rounds N] FILE.parquet

Ours is the whole preparation: reading the file, checking, rendering, proving every target, tokenising, writing the
store. Theirs is `apply_chat_template(tokenize=True)`, row by row, over conversations that were read and parsed before.
One thread, CPU time, the two in turn: other programs on the machine change little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--template")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=-1)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys, as for training")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from transformers import AutoTokenizer

    from apollo_sft.config.compose import compose
    from apollo_sft.data.read.conversation import needed_columns, parse_row
    from apollo_sft.data.read.rows import read_rows
    from apollo_sft.data.render.template import resolve_template
    from apollo_sft.data.store.open import StoreRequest, prepare_store

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    keys = ["data.val_files=null", "data.multiturn.enable=true", "data.max_length=1000000", *given.set]
    data = compose([f"data.train_files={given.file}", *keys]).config.data
    data = data.model_copy(update={"chat_template": given.template})
    template = resolve_template(tokenizer, data)
    rows = [parse_row(row, ref, data) for ref, row in read_rows([given.file], needed_columns(data), given.rows)]

    def theirs() -> None:
        for row in rows:
            text: Any = template.text_for(row.tools is not None)
            tokenizer.apply_chat_template(row.messages, row.tools, chat_template=text, **row.template_kwargs)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fresh = data.model_copy(update={"store_dir": folder})
            store = prepare_store(
                StoreRequest("train", (given.file,), given.rows, tokenizer, template, fresh), lambda _: None
            )
            summary.update(samples=store.summary.num_samples, turns=store.summary.num_turns)

    summary: dict[str, int] = {}
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(given.rounds)]
    name = Path(given.file).parent.parent.name
    used = Path(given.template).stem if given.template else "its own template"
    counts = f"{len(rows):,} rows, {summary['samples']:,} samples, {summary['turns']:,} turns"
    print(f"{name}, {Path(given.tokenizer).name} with {used}: {counts}")
    for who, times in zip(("transformers", "apollo-sft"), zip(*pairs, strict=True), strict=True):
        print(f"  {who:13} {len(rows) / min(times):8,.0f} rows/s")
    print(f"  ratio         {statistics.median(a / b for a, b in pairs):8.2f} (median of {given.rounds} pairs)")


def seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
