"""Where the noise of a run's samples is drawn."""

from types import SimpleNamespace

import torch

from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion import FlowMatchingSchedule, PhasePlan
from megatron_pdmd.distillation.randomness import Counter
from megatron_pdmd.training.sampling import Sampler


def test_noise_is_drawn_on_the_device_of_the_samples(noise_devices):
    """A kernel backend for that device alone must be enough; meta stands for any device."""
    schedule = FlowMatchingSchedule(3.0)
    sampler = Sampler(
        roles=SimpleNamespace(run=lambda request: torch.empty_like(request.x_t)),
        plan=PhasePlan.build(4, (2, 2), schedule, None),
        schedule=schedule,
        prompts=PromptEmbeddings(("a", "b"), (torch.zeros(2, 8, 4),), torch.zeros(8, 4), negative_prompt=""),
        latent_shape=(1, 2, 2, 2),
        counter=Counter(3, 0, 0, 0),
        topology=SimpleNamespace(device=torch.device("meta"), data=1, data_rank=0),
        batch_size=2,
    )
    samples = sampler.student([0, 1, 0])
    assert samples.device.type == "meta" and samples.shape == (3, 1, 2, 2, 2)
    assert noise_devices == ["meta", "meta"]
