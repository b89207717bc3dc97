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
    """A model, the part of it that is trained, and the losses of a batch.

    Attributes:
        model: the whole model, for sampling, validation and exports.
        trainable: holds all parameters that are trained and averaged; others in it are frozen.
        discriminator: a second network, trained against the model; None = there is none.
        step: index of the current step, which the training loop sets.
        betas: of Adam, where the config names none; None = the optimizer's own.
        is_shardable: whether FSDP may shard `trainable`.
    """

    model: LatentDiffusion | AutoencoderKL
    trainable: nn.Module
    discriminator: nn.Module | None = None
    step: int = 0
    betas: ClassVar[tuple[float, float] | None] = None
    is_shardable: ClassVar[bool] = False

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
        """Compute the losses of the discriminator, as `loss` does those of the model."""
        raise NotImplementedError
