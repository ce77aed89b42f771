"""The process of the long test of `test_plan`: by how much its peak of resident memory grows in two steps. In bytes."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import StepBatch, pack
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import load
from apollo_sft.parallel import launch
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.report.metrics import peak_resident_bytes
from apollo_sft.train.assemble import assemble
from apollo_sft.train.step import train_step


def main(out: Path, folder: Path) -> None:
    config = compose(["data.train_files=none", "data.val_files=null", f"model.partial_pretrain={folder / 'model'}"])
    world = launch.start("cpu", needs_group=False)
    store = SampleStore(folder / "store")
    batch = pack([store[i] for i in range(len(store))])
    hf_config = load.read_config(folder / "model", False)
    before = _resident()
    model, optimizer = assemble(config.config, folder / "model", hf_config, world, build_mesh(world, 1))
    step = StepBatch(0, 0, [batch] * 2, [[]] * 2, 1, batch.num_targets, batch.input_ids.numel())
    for _ in range(2):
        train_step(model, optimizer, step, world, 1.0)
    out.write_text(json.dumps(peak_resident_bytes() - before))
    os._exit(0)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
