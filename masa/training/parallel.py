"""What several processes of one training do: DDP, each with the whole model, or FSDP2, each with a part of everything.

Only this module knows the difference; :mod:`masa.training.trainer` asks it for arguments, optimiser and model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from transformers import Trainer

from masa.errors import MasaError
from masa.sharing.projections import blocks
from masa.training import optimizers


def is_sharded(spec: Mapping[str, Any]) -> bool:
    """Whether a run cuts its weights into parts; one process alone has nothing to cut."""
    return spec["training"].get("parallel", "ddp") == "fsdp" and PartialState().num_processes > 1


def check(spec: Mapping[str, Any]) -> None:
    """See that a run that cuts its weights into parts can.

    Raises:
        MasaError: an average of the weights, which is not kept in parts, or an optimiser that needs whole matrices.
    """
    if not is_sharded(spec):
        return
    if spec["training"].get("ema_decay"):
        raise MasaError(f"{spec['run']}: training.ema_decay needs training.parallel: ddp.")
    if spec["training"].get("average_fraction"):
        raise MasaError(f"{spec['run']}: training.average_fraction needs training.parallel: ddp.")
    name, optimizer = optimizers.of(spec["training"])
    if not optimizer.sharded:
        raise MasaError(f"{spec['run']}: training.optimizer: {name} needs whole matrices; set training.parallel: ddp.")


def agreed(decide: Callable[[], Any]) -> Any:
    """What the first process decides, in all of them; all must call it.

    Raises:
        MasaError: what the first one raised, in all of them, so that none waits for the others.
    """
    state = PartialState()
    if state.num_processes == 1:
        return decide()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = decide()
        except MasaError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise MasaError(found[1])
    return found[0]


def arguments(spec: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What Hugging Face's TrainingArguments need to know.

    The blocks are gathered one at a time; what they share (MASA's atoms, embeddings) belongs to the root and stays
    gathered through the step.
    """
    if not is_sharded(spec):
        return {"ddp_find_unused_parameters": False}  # none is
    block = type(blocks(model)[0]).__name__
    return {
        "fsdp": True,
        "fsdp_config": {"transformer_layer_cls_to_wrap": [block], "state_dict_type": "SHARDED_STATE_DICT"},
    }


def prepare(
    trainer: Trainer,
    spec: Mapping[str, Any],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], Any],
) -> None:
    """Tell a Trainer how to make its optimiser, which FSDP wants made from the parts."""

    def create_optimizer(model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainer.optimizer = optimizer(model or trainer.model)
        return trainer.optimizer

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.lr_scheduler = scheduler(optimizer or trainer.optimizer)
        return trainer.lr_scheduler

    trainer.create_optimizer, trainer.create_scheduler = create_optimizer, create_scheduler
    state = trainer.accelerator.state
    if is_sharded(spec) and state.distributed_type is DistributedType.MULTI_CPU:
        # accelerate shards on accelerators alone; torch does it on CPUs as well, and so we can test it
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


def whole(spec: Mapping[str, Any], model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The model in one piece, in the first process; the others return what they have. All processes must call it.

    Args:
        model: as it is trained.
        build: makes another one; called where the weights are in parts.
    """
    if not is_sharded(spec):
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not PartialState().is_main_process:
        return model
    with torch.random.fork_rng():
        copy = build()
    copy.load_state_dict(weights)
    return copy.to(PartialState().device)
