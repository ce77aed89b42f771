"""Each architecture is exact in packs and slices, or refused with the reason; the table of it in the docs.

`APOLLO_WRITE_DOCS=1 pytest tests/parity/test_architectures.py` writes it.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import pack
from apollo_sft.errors import ModelError
from apollo_sft.model import attention, load
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.assemble import assemble
from tests.support.architectures import (
    CASES,
    MUST_PASS,
    Gradients,
    case_config,
    documents,
    load_case,
    plain_twin,
    run_alone,
    run_packed,
    save_case,
    transformers_class,
    worst_difference,
)
from tests.support.ranks import run_on_ranks

BOUND = 1e-12
DOCS = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
HYBRIDS = ["Qwen3.5", "Qwen3-Next", "Granite 4 (hybrid)", "Jamba", "Mamba", "Mamba 2", "LFM2", "MiniMax"]

INTRODUCTION = """\
# Architectures

Documents are packed into one row without padding, and a row can be cut over several ranks. Both are exact only if the
layers of a model mix positions through the attention function that is passed to them, and through nothing else. So an
architecture is either exact here, or refused at the start with the reason.

* The config is checked before any weight is read: layers that carry state and attention that is not causal are
  refused.
* Any other causal language model of transformers may run too. When the weights are loaded, two packed documents must
  give the loss that transformers' own eager forward gives for each alone, and sliding windows must be passed to the
  attention function. Otherwise the run is refused. Those documents are short: behaviour that changes only with length
  is not tested.
* Sliding windows, soft-capped scores, sinks, scaled logits and tied heads are computed as transformers computes them.
* The auxiliary load-balancing loss of experts is not part of the loss. transformers adds it only when `config.json`
  has `output_router_logits: true`; such a model is refused until that is `false`.
* `longrope` chooses its factors by the longest document of a forward pass. Documents longer than
  `original_max_position_embeddings` are refused, because they would change the documents that are packed with them.
* Multimodal models train on text; the parts for images get no gradient.

`APOLLO_WRITE_DOCS=1 pytest tests/parity/test_architectures.py` writes the table, with tiny models with random
weights, in float64 on a CPU. A figure is the largest relative difference of the loss or of any parameter's gradient:
*packed* compares a pack with each document alone, *sp = 2* a pack split over two ranks, with FSDP2, with one process,
*plain* a pack with transformers' eager forward of each document. All must be below 1e-12. transformers computes
norms, softmax and routers in float32 for weights of any dtype; here they are computed in float64, so that rounding
hides no error.

"""
IN_ONE_PROCESS = "packed.pt"
"""The file in a model's folder with loss and gradients of the pack in one process."""

COLUMNS = ["Architecture", "transformers class", "Verdict", "packed", "sp = 2", "plain", "Reason"]
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


@dataclass(frozen=True)
class Verdict:
    """`reason`: why it is refused, empty when it is not. `early`: before weights are read."""

    reason: str
    early: bool
    packed: float = 0.0
    plain: float = 0.0

    @property
    def exact(self) -> bool:
        return not self.reason


@functools.cache
def judge(name: str, folder: Path) -> Verdict:
    """What a run does with this architecture: refuse it by its config, by the proof, or train it."""
    attention.register(attention.sdpa_kernel)
    try:
        load.check_architecture(case_config(name), trust_remote_code=False)
    except ModelError as error:
        return Verdict(str(error), early=True)
    place = save_case(folder, name)
    causal_lm = load_case(place)
    model = SftModel(causal_lm)
    try:
        prove(model, seed=1)
    except ModelError as error:
        return Verdict(str(error), early=False)
    causal_lm.eval()
    with StaysDouble():
        packed = run_packed(model, pack(documents()))
        alone = run_alone(causal_lm, documents())
        plain = run_alone(plain_twin(causal_lm), documents())
    torch.save(packed, place / IN_ONE_PROCESS)
    return Verdict("", False, worst_difference(packed, alone), worst_difference(packed, plain))


@functools.cache
def config_of(world_size: int) -> SftConfig:
    keys = ["model.partial_pretrain=none", "data.train_files=none", "data.val_files=null"]
    keys += ["model.fsdp_config.model_dtype=fp64", f"ulysses_sequence_parallel_size={world_size}"]
    return compose(keys).config


def assembled(place: Path, world: World) -> SftModel:
    """The model as a run has it: built without memory, sharded, filled from rank 0, its row cut over all ranks."""
    config = config_of(world.size)
    mesh = build_mesh(world, world.size, config.model.fsdp_config.fsdp_size)
    model, _ = assemble(config, place, load.read_config(place, False), world, mesh)
    return model.eval()


def gather(part: tuple[float, Gradients], size: int) -> tuple[float, Gradients]:
    """The sum over ranks. Sharding averages gradients."""
    loss = torch.tensor(part[0], dtype=torch.float64)
    dist.all_reduce(loss)
    return float(loss), {name: gradient.full_tensor() * size for name, gradient in part[1].items()}


def slice_all(world: World, folder: Path, names: list[str]) -> dict[str, float]:
    """On every rank: each architecture under sequence parallelism against one process, in fp64."""
    micro_batch = pack(documents(), multiple=world.size)
    figures = {}
    for name in names:
        place = save_case(folder, name)
        model = assembled(place, world)
        with StaysDouble():
            sliced = gather(run_packed(model, micro_batch), world.size)
        in_one_process = torch.load(place / IN_ONE_PROCESS)  # noqa: TID251  # this test has written it
        figures[name] = worst_difference(sliced, in_one_process)
    return figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def sliced(folder: Path) -> dict[str, float]:
    """Figures on two ranks, of those that are not refused."""
    names = [name for name in CASES if judge(name, folder).exact]
    figures: dict[str, float] = run_on_ranks(slice_all, 2, folder, names)[0]
    return figures


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str, folder: Path) -> None:
    verdict = judge(name, folder)
    if name in MUST_PASS:
        assert verdict.exact, verdict.reason
    assert max(verdict.packed, verdict.plain) <= BOUND


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_refused_by_their_config(name: str, folder: Path) -> None:
    verdict = judge(name, folder)
    assert verdict.early
    assert "mix packed documents in a way that is not supported" in verdict.reason


def test_two_ranks_equal_one(sliced: dict[str, float]) -> None:
    assert sliced.keys() >= MUST_PASS.keys()
    beyond = {name: figure for name, figure in sliced.items() if not figure <= BOUND}
    assert not beyond


def table_row(name: str, verdict: Verdict, sliced: dict[str, float]) -> str:
    if verdict.exact:
        cells = ["exact", *(f"{figure:.0e}" for figure in (verdict.packed, sliced[name], verdict.plain)), ""]
    else:
        lines = verdict.reason.splitlines()
        found = next((line.partition(":")[2].strip() for line in lines if line.startswith("  found:")), "")
        reason = lines[0].partition(": ")[2] or lines[0]
        when = "by its config" if verdict.early else "by the proof"
        cells = [f"refused {when}", "", "", "", reason + (f" ({found})" if found else "")]
    return f"| {name} | `{transformers_class(case_config(name))}` | {' | '.join(cells)} |\n"


def verdicts(text: str) -> list[list[str]]:
    """The first three cells of each row."""
    return [line.split("|")[1:4] for line in text.splitlines() if line.startswith("|")]


def test_the_table_in_the_docs_is_current(folder: Path, sliced: dict[str, float]) -> None:
    rows = [table_row(name, judge(name, folder), sliced) for name in CASES]
    text = INTRODUCTION + HEADER + "".join(rows)
    if os.environ.get("APOLLO_WRITE_DOCS") == "1":
        DOCS.write_text(text, encoding="utf-8")
    assert verdicts(DOCS.read_text(encoding="utf-8")) == verdicts(text), "write it anew: APOLLO_WRITE_DOCS=1"
