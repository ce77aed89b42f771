"""Every family with Liger's kernels against the same without, on CPU by Triton's interpreter: one JSON line each.

The interpreter of Triton 3.9 hands numbers to kernels as Python's own and knows no functions of CUDA's libdevice: both
are put right here, outside the kernels.
"""

import importlib
import json

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tests.support.liger import FAMILIES, model_of, patched, rope_of, set_rope, step, with_kernels
from tests.support.oracle import worst_difference

convert = interpreter._implicit_cvt


def converted(value: object) -> object:
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return convert(value)


def main() -> None:
    interpreter._implicit_cvt = converted
    vars(importlib.import_module("liger_kernel.ops.rms_norm"))["rsqrt"] = lambda x: tl.rsqrt(x)
    vars(importlib.import_module("liger_kernel.ops.geglu"))["tanh"] = lambda x: 2 * tl.sigmoid(2 * x) - 1
    for family in FAMILIES:
        plain = step(model_of(family))
        model = with_kernels(model_of(family))
        other = step(model_of(family))  # built later: as before
        rotate = rope_of(model)
        kernel = getattr(rotate, "on_cuda", rotate)
        found = step(set_rope(model, kernel))
        set_rope(model, rotate)
        difference = worst_difference(found[1], plain[1])
        same = other[0] == plain[0] and worst_difference(other[1], plain[1]) == 0
        line = {
            "family": family,
            "loss": [plain[0], found[0]],
            "gradient": difference,
            "patched": sorted(patched(model)),
        }
        print(
            json.dumps(line | {"patched": sorted(patched(model)), "rope": kernel is not rotate, "same": same}),
            flush=True,
        )


if __name__ == "__main__":
    main()
