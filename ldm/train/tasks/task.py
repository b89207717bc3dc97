"""Base class of training tasks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ldm.conditioning import Batch
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL

__all__ = ["Batch", "LossFunction", "Losses", "Task"]

Losses: TypeAlias = dict[str, Tensor]  # "loss" is differentiated, the others are logged
LossFunction: TypeAlias = Callable[[Batch, torch.Generator], Losses]


class Task(ABC):
    """A model, its trained part, and the losses of a batch."""

    model: LatentDiffusion | AutoencoderKL  # for sampling, validation and exports
    trainable: nn.Module  # has all parameters that are trained and averaged, and frozen ones
    discriminator: nn.Module | None = None  # trained against the model
    step: int = 0  # the current one, set by the training loop
    betas: ClassVar[tuple[float, float] | None] = None  # of Adam, unless the config has some
    is_shardable: ClassVar[bool] = False  # by FSDP

    @abstractmethod
    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Compute the losses of a batch.

        Args:
            batch: samples of the data set, or their cached latents.
            generator: of all random numbers but dropout.
        Returns:
            "loss", a scalar to differentiate, and detached values to log; those with a batch
            dimension, such as "t" and "losses" (B,), are per sample.
        """

    @abstractmethod
    def weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the weights of the whole model, under our names.

        Args:
            images: (3, H, W) in [-1, 1], of the training data, where statistics are needed.
        """

    @property
    def trains_discriminator(self) -> bool:
        """Whether the discriminator is trained at the current step."""
        return False

    def discriminator_loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Compute the losses of the discriminator, in the form of `loss`."""
        raise NotImplementedError
