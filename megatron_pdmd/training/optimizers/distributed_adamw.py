"""megatron-core's distributed optimizer around ``FusedAdamW``: main weights and moments split over the data ranks.

megatron-core names ``exp_avg`` outright where it exchanges optimizer state, reads ``step`` from where torch's Adam
keeps it, and finds a parameter's shard by a position that is wrong where one group has bf16 and fp32 parameters. The
subclass answers for these; everything that trains is inherited.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_pdmd.training.optimizers.adamw import FusedAdamW


class DistributedAdamW(DistributedOptimizer):
    """A distributed optimizer whose ``optimizer`` is a ``FusedAdamW``, with or without a first moment.

    Its ``sharded_state_dict`` can be saved and loaded by ``megatron.core.dist_checkpointing`` with
    ``metadata={"distrib_optim_sharding_type": "fully_reshardable"}``; a first moment that is not kept is zeros there.
    """

    optimizer: FusedAdamW

    def main_shards(self) -> dict[torch.nn.Parameter, tuple[torch.Tensor, Range]]:
        """The parameters that this rank updates at least a part of.

        Returns:
            For each, the flat fp32 tensor that is updated, and its range in the flattened parameter.
        """
        pairs = (
            (self.model_fp32_groups, self.shard_fp32_groups),
            (self.model_float16_groups, self.shard_fp32_from_float16_groups),
        )
        return {
            parameter: (main, self._get_model_param_range_map(parameter)["param"])
            for model_groups, main_groups in pairs
            for model_group, main_group in zip(model_groups, main_groups, strict=True)
            for parameter, main in zip(model_group, main_group, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The parameter groups without their parameters; ``step`` is among their values."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` or a loaded ``sharded_state_dict`` holds."""
        self.optimizer.initialize_state()
        saved = {_identity(group): group for group in state_dict["optimizer"]["param_groups"]}
        for group in self.param_groups:
            group.update({key: value for key, value in saved[_identity(group)].items() if key != "params"})
        if "param_state" in state_dict:
            assert state_dict["param_state_sharding_type"] == "fully_reshardable", "the one format that fits any layout"
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])

    def _get_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        self.optimizer.initialize_state()
        main, _ = self.main_shards()[model_param]
        # No memory: every element is the same zero.
        return {"param": main, "exp_avg": main.new_zeros(()).expand_as(main)} | self.optimizer.state[main]

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        main, _ = self.main_shards()[model_param]
        for name, target in ({"param": main} | self.optimizer.state[main]).items():
            target.copy_(tensors[name])


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in param_group_identifier_keys)
