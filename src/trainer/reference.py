"""A reference model that waits in the CPU's memory, and is on the device only while it is asked (`--ref_offload`).

It is asked once per generation batch; rollout, policy pass and optimizer have its room on the device. Its weights never
change, so they are copied in one direction only. Leaves out references of which there is no whole copy: ZeRO-3's, which
is divided among the processes, and that of adapters, which is the model itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from trl import GRPOConfig


def check_ref_offload(args: GRPOConfig, adapters: bool) -> None:
    """Raise a `ValueError` for a run whose reference cannot wait on the CPU, with what works.

    Args:
        adapters: are all that is trained, so that the reference is the model with them off.
    """
    if args.beta == 0:
        raise ValueError("--ref_offload true with --beta 0: without a KL term there is no reference model to move")
    if adapters:
        raise ValueError("--ref_offload true with --use_peft true: the reference is the model with its adapters off")
    if args.sync_ref_model:
        raise ValueError(
            "--ref_offload true with --sync_ref_model true: a reference that is updated stays on the device"
        )
    if args.deepspeed and args.hf_deepspeed_config.get_value("zero_optimization.stage", 0) == 3:
        raise ValueError(
            "--ref_offload true with ZeRO-3: the reference is divided among the processes already; "
            "CONFIG=conf/ds_zero3_offload.json keeps its parts, and the model's, on the CPU"
        )


class WaitingReference:
    """Keeps a model's weights on the CPU, in the dtype they have, so that its log-probs are those of one that stays.

    Buffers, which are a few numbers, stay on the device.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        """Move `model`'s weights from `device` to the CPU."""
        self.device = device
        self.parameters = list(model.parameters())
        # Pinned memory is copied several times as fast.
        self.waiting = [to_host(parameter.data, pinned=device.type == "cuda") for parameter in self.parameters]
        self._leave()

    @contextmanager
    def fetched(self) -> Iterator[None]:
        """Within this context the model's weights are on the device."""
        try:
            for parameter, waiting in zip(self.parameters, self.waiting, strict=True):
                parameter.data = to_device(waiting, self.device)
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, waiting in zip(self.parameters, self.waiting, strict=True):
            parameter.data = waiting


def to_host(tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
    host = tensor.to("cpu")
    return host.pin_memory() if pinned else host


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)
