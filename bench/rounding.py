"""What a model folder with float32 weights loses in bfloat16: rounded to the nearest, and as this trainer rounds.

    python bench/rounding.py FOLDER FILE.parquet [--base FOLDER] [--rows N] [--set KEY=VALUE …]

FOLDER comes from `apollo-sft export RUN OUT --dtype fp32`. Printed is the mean loss of the targets of the first rows of
the file; `--set`: how the file is read, as for training. `--base`: the model that the training started from.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.config.compose import compose
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.store.open import StoreRequest, prepare_store
from apollo_sft.tools.verify.oracle import oracle
from apollo_sft.types import Sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="how the file is read")
    given = parser.parse_args()
    samples = rows_of(given)
    trained = weights_of(given.folder)
    if given.base is not None:
        print(f"the base                     {loss_of(weights_of(given.base), samples):.5f}")
    print(f"float32                      {loss_of(trained, samples):.5f}")
    for name, as_written in (
        ("bfloat16, to the nearest", lambda tensor, _: tensor.to(torch.bfloat16)),
        ("bfloat16, as it is written", lambda tensor, name: cast(tensor, torch.bfloat16, name)),
    ):
        rounded = weights_of(given.folder)
        with torch.no_grad():
            for parameter_name, parameter in rounded.named_parameters():
                parameter.copy_(as_written(parameter, parameter_name))
        print(f"{name:28} {loss_of(rounded, samples):.5f}")


def weights_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss_of(model: Any, samples: list[Sample]) -> float:
    return oracle(model, samples)[0]


def rows_of(given: argparse.Namespace) -> list[Sample]:
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    data = compose([f"data.train_files={given.file}", "data.val_files=null", *given.set]).config.data
    with tempfile.TemporaryDirectory() as folder:
        request = StoreRequest(
            "train",
            (given.file,),
            given.rows,
            tokenizer,
            resolve_template(tokenizer, data),
            data.model_copy(update={"store_dir": folder}),
        )
        store = prepare_store(request, lambda _: None)
        return [
            Sample(s.input_ids.copy(), s.labels.copy(), s.ref, s.turns) for s in (store[i] for i in range(len(store)))
        ]


if __name__ == "__main__":
    main()
