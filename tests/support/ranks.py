"""Start a worker script on N gloo ranks by torchrun, once, and collect what rank 0 wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300


def run_ranks(script: Path, size: int, folder: Path, *arguments: str, seconds: float = TIMEOUT_SECONDS) -> Any:
    """Run `script OUT *arguments` on `size` ranks; return the JSON that it wrote to OUT. It may take `seconds`."""
    out = folder / f"{script.stem}-{size}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    finished = subprocess.run(
        [*command, str(script), str(out), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    return json.loads(out.read_text())
