"""GELU with the tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). It is torch's own, which is exact enough."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """y in the dtype of x."""
    return F.gelu(x, approximate="tanh")


def gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    """dx in the dtype of x."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
