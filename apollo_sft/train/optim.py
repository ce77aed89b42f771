"""The optimizer: AdamW, with weight decay on matrices only."""

from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from apollo_sft.config.schema import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> AdamW:
    """AdamW over what is trainable. Norm gains and biases (fewer than two dims) are not decayed.

    The learning rate is set before every step, see `schedule`.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = optim.betas
    return AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=(beta1, beta2), fused=True)
