"""The base class of the original's models: Lightning's if that is installed, else a small one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.compat.ema import LitEma
from ldm.loading.files.checkpoint import read_checkpoint

__all__ = ["LightningModule", "TrainedModule", "read_state"]


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


class TrainedModule(LightningModule):
    """What autoencoder and diffusion model have in common: images of a batch, averaged weights."""

    use_ema: bool
    model_ema: LitEma

    @property
    def averaged_part(self) -> nn.Module:
        """The part whose weights are averaged."""
        return self

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Have the averaged weights inside the context, if there are any."""
        if not self.use_ema:
            yield
            return
        part = self.averaged_part
        self.model_ema.store(part.parameters())
        self.model_ema.copy_to(part)
        try:
            yield
        finally:
            self.model_ema.restore(part.parameters())

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the average."""
        if self.use_ema:
            self.model_ema(self.averaged_part)

    def get_input(self, batch: dict[str, Any], k: str) -> Any:
        """Return the images of a batch, which are (B, H, W, C) there, as (B, C, H, W) float32."""
        x: Tensor = batch[k]
        x = x[..., None] if x.dim() == 3 else x
        return x.movedim(-1, 1).to(memory_format=torch.contiguous_format).float()


def read_state(path: str, ignore_keys: Sequence[str]) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, averaged ones included, without running what is in it.

    Args:
        ignore_keys: Starts of names that are left out.
    """
    file = read_checkpoint(path)
    weights = {**file.state, **file.ema_state}
    ignored = tuple(ignore_keys)
    return {name: value for name, value in weights.items() if not name.startswith(ignored)}
