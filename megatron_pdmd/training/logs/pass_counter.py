"""FLOPs and tokens of the passes that are really run: how many steps a rollout has is drawn anew in each update."""

import math

from megatron_pdmd.distillation.roles import Pass, Roles
from megatron_pdmd.models.conditions import Conditions
from megatron_pdmd.planning.flops import PassSize, backward_flops, forward_flops


class PassCounter:
    """Adds up the passes of one replica, all of its ranks together.

    Attributes:
        flops: the model's own, of forward and backward passes; see `planning.flops`.
        tokens: latent tokens that went through a network, once for each pass.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.tokens = 0

    def add(self, request: Pass, roles: Roles) -> None:
        """Counts a pass, and its backward pass where one will follow."""
        model, adapter = roles.network(request)
        config = model.config
        tokens = math.prod(request.x_t.shape[2:]) // math.prod(config.patch_size)
        size = PassSize(len(request.x_t), tokens, Conditions.of(request.conditions).text.shape[1])
        rank = model.adapters[adapter].rank if adapter else 0
        self.flops += forward_flops(config, size, adapter_rank=rank)
        if request.gradient:
            learns = request.x_t.requires_grad
            self.flops += backward_flops(config, size, adapter_rank=rank, latents_have_gradient=learns)
        self.tokens += size.samples * size.tokens
