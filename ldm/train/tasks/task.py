"""Base class of training tasks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ldm.conditioning import Batch
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import Autoencoder

__all__ = ["Batch", "LossFunction", "Losses", "Task"]

Losses: TypeAlias = dict[str, Tensor]  # "loss" is differentiated, the others are logged
LossFunction: TypeAlias = Callable[[Batch, torch.Generator], Losses]


class Task(ABC):
    """A model, the networks to train, and the losses of a batch.

    Attributes:
        model: The whole model, for sampling, validation and exports.
        trainable: Module with all trained parameters; it may also have frozen ones.
        discriminator: Network to train against the model; None = no discriminator.
        step: Current step, set by the training loop.
        betas: Default betas of AdamW; None = torch's.
    """

    model: LatentDiffusion | Autoencoder
    trainable: nn.Module
    discriminator: nn.Module | None = None
    step: int = 0
    betas: ClassVar[tuple[float, float] | None] = None

    @abstractmethod
    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Compute the losses of a batch.

        Args:
            batch: Samples of the dataset, or their cached latents.
            generator: For all random numbers except dropout, which uses torch's global generator.
        Returns:
            "loss", a scalar to differentiate; detached scalars to log; and detached values per
            sample, "t" and "loss_per_sample" (B,), if the task has timesteps.
        """

    @abstractmethod
    def get_weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the weights of the whole model, under our names.

        Args:
            images: Training images (3, H, W) in [-1, 1], for tasks that need statistics.
        """

    @property
    def trains_discriminator(self) -> bool:
        """Whether the discriminator is trained at the current step."""
        return False

    def discriminator_loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Compute the losses of the discriminator, as `loss` returns them."""
        raise NotImplementedError
