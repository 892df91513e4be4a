"""What this machine lacks is refused before a run, by the flag that asks for it."""

import pytest
import torch

from megatron_pdmd.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_pdmd.models.layers import attention
from megatron_pdmd.preflight import check_device

FLASH, TRITON = ModelConfig(attention_backend="flash"), ModelConfig(kernel_backend="triton")
NCCL, BF16 = ParallelConfig(distributed_backend="nccl"), TrainingConfig(bf16=True)


@pytest.mark.parametrize(
    ("has_cuda", "has_flash", "config", "line"),
    [
        (False, False, Config(FLASH, training=BF16), "--attention-backend flash: flash-attn is not installed"),
        (False, True, Config(FLASH, training=BF16), "--attention-backend flash: needs a CUDA device"),
        (True, True, Config(FLASH), "--attention-backend flash: takes no fp32; add --bf16"),
        (False, False, Config(parallel=NCCL), "--distributed-backend nccl: needs a CUDA device"),
        (False, False, Config(TRITON), "--kernel-backend triton: not there for cpu tensors"),
    ],
)
def test_a_backend_whose_device_or_package_is_not_there(has_cuda, has_flash, config, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(attention, "flash_attention_available", lambda: has_flash)
    with pytest.raises(ValueError) as refused:
        check_device(config)
    assert str(refused.value).startswith(line)


def test_what_is_there_passes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "flash_attention_available", lambda: True)
    check_device(Config(FLASH, parallel=NCCL, training=BF16))
