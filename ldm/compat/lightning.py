"""The base class of the original's models: Lightning's if that is installed, else a small one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

__all__ = ["LightningModule"]


class PlainModule(nn.Module):
    """What the models need of Lightning, for everything but `Trainer.fit`."""

    global_step = 0
    current_epoch = 0
    trainer: object = None
    logger: object = None
    learning_rate: float

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def log(self, name: str, value: Tensor | float, **options: object) -> None:
        """Do nothing: there is no trainer."""

    def log_dict(self, dictionary: Mapping[str, Tensor], **options: object) -> None:
        """Do nothing: there is no trainer."""

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Do nothing: there is no trainer."""

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Do nothing: there is no trainer."""

    def manual_backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        loss.backward()

    def optimizers(self) -> Any:
        """Return the optimizer of the trainer, which is missing."""
        raise RuntimeError("this model has no trainer")


if TYPE_CHECKING:
    LightningModule = PlainModule
else:
    try:
        # Not `lightning.pytorch`, whose class another one is: programs of that time name this one.
        from pytorch_lightning import LightningModule
    except ImportError:
        LightningModule = PlainModule
