"""What preparing many rows costs: time, and memory that does not grow with them.

    python bench/prepare_size.py [--rows N …] [--processes N …] [--folder FOLDER]

Rows of a question and an answer are generated into a parquet file, the tokenizer is trained on them, and each number of
rows is prepared by each number of processes, in a new process each time. *parent*: peak of resident memory of the one
that trains later; *worker*: of the largest of the others. *beyond*: bytes a row by which the parent's peak grows from
the fewest rows to this number. *store*: bytes on the disk a row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "lt", "sk")]
GROUP_ROWS = 50_000
WATCH_SECONDS = 0.05


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--words", type=int, default=12, help="of a question and of an answer, on average")
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one, removed at the end")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.one:
        print(json.dumps(one(Path(given.one[0]), int(given.one[1]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder / "tokenizer")
        print(f"{'rows, processes':24}  {'rows/s':>9}  {'CPU s':>7}  {'parent MiB':>10}  {'worker MiB':>10}", end="")
        print(f"  {'beyond B/row':>12}  {'store B/row':>11}")
        first: dict[int, dict[str, float]] = {}
        for rows in sorted(given.rows):
            file = folder / f"{rows}.parquet"
            write_rows(file, rows, given.words)
            for processes in given.processes:
                command = [sys.executable, __file__, "--one", str(file), str(processes)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                fewest = first.setdefault(processes, found)
                grown = (found["parent"] - fewest["parent"]) / max(rows - fewest["rows"], 1)
                print(
                    f"{f'{rows:,}, {processes}':24}  {rows / found['seconds']:>9,.0f}  {found['cpu']:>7,.1f}"
                    f"  {found['parent'] / 2**20:>10,.0f}  {found['worker'] / 2**20:>10,.0f}"
                    f"  {grown:>12.1f}  {found['store'] / rows:>11,.0f}",
                    flush=True,
                )


def write_rows(file: Path, number: int, words: int) -> None:
    """From a seed, a row group at a time."""
    rng = np.random.default_rng(number)
    writer = None
    for first in range(0, number, GROUP_ROWS):
        rows = min(GROUP_ROWS, number - first)
        texts = []
        for _ in range(2):
            counts = rng.integers(1, 2 * words, rows)
            chosen = iter(rng.choice(WORDS, counts.sum()).tolist())
            texts.append([" ".join([next(chosen) for _ in range(count)]) for count in counts.tolist()])
        table = pa.table({"question": texts[0], "answer": texts[1]})
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE of 1,000 tokens, with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=specials[0], additional_special_tokens=specials
    )
    fast.save_pretrained(folder)


def one(file: Path, processes: int) -> dict[str, float]:
    """Prepare `file` in this process and watch it and those that it starts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    from apollo_sft.config.compose import compose
    from apollo_sft.data.render.template import resolve_template
    from apollo_sft.data.store.open import StoreRequest, prepare_store

    tokenizer = AutoTokenizer.from_pretrained(file.parent / "tokenizer")
    with tempfile.TemporaryDirectory(dir=file.parent) as store_dir:
        keys = [f"data.train_files={file}", "data.val_files=null", "data.chat_template=chatml"]
        data = compose([*keys, f"data.store_dir={store_dir}"]).config.data
        template = resolve_template(tokenizer, data)
        request = StoreRequest("train", (str(file),), -1, tokenizer, template, data, processes)
        watched = Watched()
        began = time.monotonic()
        store = prepare_store(request, lambda text: print(text, file=sys.stderr))
        seconds = time.monotonic() - began
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "rows": len(store),
            "seconds": seconds,
            "cpu": sum(usage.ru_utime + usage.ru_stime for usage in used),
            "parent": peak_bytes("self"),
            "worker": watched.peak,
            "store": sum(path.stat().st_size for path in store.folder.iterdir()),
        }


class Watched(threading.Thread):
    """`peak`: the largest peak of resident bytes of all processes that this one has started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            children = [pid for task in Path("/proc/self/task").iterdir() for pid in words_of(task / "children")]
            self.peak = max([self.peak, *map(peak_bytes, children)])
            time.sleep(WATCH_SECONDS)


def words_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:  # it has ended
        return []


def peak_bytes(pid: str) -> int:
    """VmHWM of a process."""
    found = re.search(r"VmHWM:\s+(\d+) kB", " ".join(words_of(Path(f"/proc/{pid}/status"))))
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
