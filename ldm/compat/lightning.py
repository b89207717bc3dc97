"""Base classes of the original's models: Lightning's if it is installed, else a replacement."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.compat.ema import LitEma
from ldm.loading.files.checkpoint import read_checkpoint


class PlainModule(nn.Module):
    """Replacement for LightningModule if Lightning is missing; its Trainer cannot train it."""

    global_step = 0
    current_epoch = 0
    trainer: object = None
    logger: object = None
    learning_rate: float

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def log(self, *args: object, **kwargs: object) -> None:
        """Do nothing: there is no trainer."""

    log_dict = log
    toggle_optimizer = log
    untoggle_optimizer = log

    def manual_backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss."""
        loss.backward()

    def optimizers(self) -> Any:
        """Raise RuntimeError, as optimizers belong to a trainer."""
        raise RuntimeError("this model has no trainer")


if TYPE_CHECKING:
    LightningModule = PlainModule
else:
    try:
        # Not `lightning.pytorch`'s, another class: third-party code tests `isinstance` with this.
        from pytorch_lightning import LightningModule
    except ImportError:
        LightningModule = PlainModule


class TrainingModule(LightningModule):
    """Base class of AutoencoderKL and DDPM, with EMA weights and batch inputs."""

    use_ema: bool
    model_ema: LitEma

    @property
    def module_with_ema(self) -> nn.Module:
        """The module whose weights `model_ema` averages."""
        return self

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the EMA weights, if there are any, inside a `with` block; `context` is ignored."""
        if not self.use_ema:
            yield
            return
        module = self.module_with_ema
        self.model_ema.store(module.parameters())
        self.model_ema.copy_to(module)
        try:
            yield
        finally:
            self.model_ema.restore(module.parameters())

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the EMA."""
        if self.use_ema:
            self.model_ema(self.module_with_ema)

    def get_input(self, batch: dict[str, Any], k: str) -> Any:
        """Return the images at a batch key, (B, H, W, C) or (B, H, W), as (B, C, H, W) float32."""
        x: Tensor = batch[k]
        x = x[..., None] if x.dim() == 3 else x
        return x.movedim(-1, 1).to(memory_format=torch.contiguous_format).float()


def read_state_dict(path: str, ignore_keys: Sequence[str]) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, EMA weights included, without unpickling objects.

    Args:
        ignore_keys: Prefixes of the names to leave out.
    """
    file = read_checkpoint(path)
    weights = {**file.state_dict, **file.ema_state_dict}
    prefixes = tuple(ignore_keys)
    return {name: value for name, value in weights.items() if not name.startswith(prefixes)}
