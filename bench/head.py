"""The head and the loss alone, forward and backward: memory and CPU time over those of full logits.

    python bench/head.py [--vocabularies 32768,…] [--shares 0.75,0.25] [--tokens N] [--timed-tokens N] [--write]

Variants: full logits of every token; logits of target rows only; these in chunks that are computed again in the
backward (torch's checkpointing); ours. Memory: of one forward and backward, each in a process of its own: the growth of
the peak resident size, and the peak of bytes counted tensor by tensor (`bench/memory.py`), which is the same every
time. Time: the variants in turn, in one process, one thread. float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import counted
from record import over, table, verdict, write_ratios, write_section
from torch import Tensor, nn

from apollo_sft.model.head import HeadSpec, attach_loss
from apollo_sft.report.metrics import peak_resident_bytes

MEMORY, TIME = 0.25, 0.85
CHUNK_ROWS = 256
WANTED_AT = (151_936, 0.75)


def full(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden), labels, reduction="sum")


def targets_only(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    at = (labels >= 0).nonzero()[:, 0]
    return nn.functional.cross_entropy(head(hidden.index_select(0, at)), labels[at], reduction="sum")


def checkpointed(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    at = (labels >= 0).nonzero()[:, 0]
    rows = zip(hidden.index_select(0, at).split(CHUNK_ROWS), labels[at].split(CHUNK_ROWS), strict=True)
    return torch.stack([checkpoint(full, head, x, y, use_reentrant=False) for x, y in rows]).sum()


def ours(head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    at = (labels >= 0).nonzero()[:, 0]
    loss: Tensor = head.loss(hidden.index_select(0, at), labels[at])
    return loss


VARIANTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "full logits": full,
    "target rows only": targets_only,
    "checkpointed chunks": checkpointed,
    "ours": ours,
}


def inputs(vocabulary: int, hidden_size: int, tokens: int, share: float) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(hidden_size, vocabulary, bias=False)
    attach_loss(head, HeadSpec())
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) >= share] = -100
    return head, torch.randn(tokens, hidden_size), labels


def once(variant: str, head: nn.Linear, hidden: Tensor, labels: Tensor) -> float:
    """The loss; gradients of weight and hidden states are made and given up."""
    x = hidden.detach().requires_grad_()
    loss = VARIANTS[variant](head, x, labels)
    loss.backward()
    head.weight.grad = None
    return float(loss.detach())


def memory_of(variant: str, vocabulary: int, hidden_size: int, tokens: int, share: float) -> dict[str, float]:
    """In this process alone. The first, small, pass lets torch take what it takes once."""
    head, hidden, labels = inputs(vocabulary, hidden_size, tokens, share)
    once(variant, *inputs(64, hidden_size, 8, 1.0))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is from now on: proc_pid_clear_refs(5)
    before = peak_resident_bytes()
    with counted(nn.Identity(), vocabulary) as memory:
        once(variant, head, hidden, labels)
    return {"rss": peak_resident_bytes() - before, "bytes": memory.all.most}


def counted_bytes(variant: str, vocabulary: int, hidden_size: int, tokens: int, share: float) -> int:
    """Peak of what lives at one time beyond the weight and the hidden states."""
    parts = inputs(vocabulary, hidden_size, tokens, share)
    with counted(nn.Identity(), vocabulary) as memory:
        once(variant, *parts)
    return memory.all.most


def in_own_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", *(str(argument) for argument in arguments)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    figures: dict[str, float] = json.loads(finished.stdout)
    return figures


def times_of(vocabulary: int, hidden_size: int, tokens: int, share: float, pairs: int) -> dict[str, list[float]]:
    """CPU seconds of each variant, in turn. The first round warms up."""
    parts = inputs(vocabulary, hidden_size, tokens, share)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(pairs + 1):
        for name in VARIANTS:
            began = time.process_time()
            once(name, *parts)
            seconds[name].append(time.process_time() - began)
    return {name: values[1:] for name, values in seconds.items()}


def compare(
    vocabulary: int, share: float, options: argparse.Namespace
) -> tuple[list[list[object]], dict[str, list[float]]]:
    sizes = (vocabulary, options.hidden, options.tokens, share)
    memory = {name: in_own_process(name, *sizes) for name in VARIANTS}
    small = memory["full logits"]["rss"] < 2**28  # what torch keeps for itself would weigh too much
    times = times_of(vocabulary, options.hidden, options.timed_tokens, share, options.pairs)
    rows: list[list[object]] = []
    ratios: dict[str, list[float]] = {}
    for name in VARIANTS:
        bytes_ratio = memory[name]["bytes"] / memory["full logits"]["bytes"]
        rss_ratio = "–" if small else f"{memory[name]['rss'] / memory['full logits']['rss']:.2f}"
        time_ratio = over(times[name], times["full logits"])
        met = ""
        if name == "ours":
            key = f"{vocabulary}, {share:.0%} targets"
            pairs = zip(times[name], times["full logits"], strict=True)
            ratios = {f"{key}: bytes": [bytes_ratio], f"{key}: time": [mine / other for mine, other in pairs]}
            in_bytes = verdict(bytes_ratio, MEMORY, at_least=False)
            met = f"memory {in_bytes}; time {verdict(time_ratio.median, TIME, at_least=False)}"
        cells = [f"{vocabulary:,}", f"{share:.0%}", name, f"{memory[name]['bytes'] / 2**20:,.0f}", f"{bytes_ratio:.2f}"]
        cells += [f"{memory[name]['rss'] / 2**20:,.0f}", rss_ratio, time_ratio]
        rows.append([*cells, f"{statistics.median(times[name]):.2f}", met])
    return rows, ratios


def more_tokens(options: argparse.Namespace) -> list[list[object]]:
    """Counted bytes of ours and of full logits as the tokens grow, with a narrow hidden state: it is not what grows."""
    rows = []
    for tokens in options.growth:
        sizes = (options.growth_vocabulary, 16, tokens, 0.75)
        found = {name: counted_bytes(name, *sizes) for name in ("ours", "full logits")}
        rest = found["ours"] - 2 * tokens * 16 * 4 * 2
        rows.append([f"{tokens:,}", *(f"{found[name] / 2**20:,.1f}" for name in found), f"{rest / 2**20:,.1f}"])
    return rows


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=whole_numbers, default=[32_768, 151_936, 262_144])
    parser.add_argument("--shares", type=lambda text: [float(part) for part in text.split(",")], default=[0.75, 0.25])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="where memory is measured")
    parser.add_argument("--timed-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--growth", type=whole_numbers, default=[512, 1024, 2048, 4096], help="tokens; 0 leaves it out")
    parser.add_argument("--growth-vocabulary", type=int, default=151_936)
    parser.add_argument("--write", action="store_true", help="write results.md and recorded.json")
    parser.add_argument("--ratios", type=Path, help="write the ratios of the pairs there")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *sizes, share = options.worker
        arguments = (name, *(int(size) for size in sizes), float(share))
        print(json.dumps(memory_of(*arguments)))
        return
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    ratios: dict[str, list[float]] = {}
    for share in options.shares:
        for vocabulary in options.vocabularies:
            found, of_these = compare(vocabulary, share, options)
            rows += found
            ratios |= of_these
    titles = ["vocabulary", "targets", "", "counted, MiB", "over full", "peak RSS, MiB", "over full"]
    shown = table([*titles, "CPU time over full", "seconds", ""], rows)
    print(shown)
    growth = ""
    if options.growth != [0]:
        titles = ["tokens", "ours, MiB", "full logits, MiB", "ours without what is as wide as the hidden states, MiB"]
        growth = table(titles, more_tokens(options))
        print(f"\n{growth}")
    if options.ratios:
        write_ratios("head", ratios, options.ratios)
    if options.write:
        write_ratios("head", ratios)
        text = f"Memory at {options.tokens} tokens, time at {options.timed_tokens}; hidden size {options.hidden}."
        more = f"Counted bytes at a vocabulary of {options.growth_vocabulary:,}, hidden size 16, 75 % targets:"
        write_section("head", "\n\n".join([__doc__ or "", text, shown, more, growth]))


if __name__ == "__main__":
    main()
