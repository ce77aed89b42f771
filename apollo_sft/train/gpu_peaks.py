"""The peak of known GPUs. Loaded only where a run has a GPU and no `trainer.peak_tflops`."""

from __future__ import annotations

BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": None,
    "A10": 125e12,
}
"""Operations a second, by words of the device's name: dense bf16 products with float32 sums. The first name fits.

Source: NVIDIA's data sheets of these products; where they count sparsity, half of the figure. None: two are published.
"""


def known_peak(device_name: str) -> float | None:
    """Return the operations a second with bf16; None for a device that the table does not hold."""
    words = device_name.replace("-", " ").split()
    for name, peak in BF16_PEAKS.items():
        if all(word in words for word in name.split()):
            return peak
    return None
