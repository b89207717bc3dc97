"""`ldm.modules.midas` of the original, and its module `api`: depth estimation by MiDaS."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.encoders.depth import MiDaSDepth, preprocess_for_midas
from ldm.loading.files.checkpoint import read_checkpoint

# Weights files of `load_model`; third-party code assigns its own paths.
ISL_PATHS = {
    "dpt_large": "midas_models/dpt_large-midas-2f21e586.pt",
    "dpt_hybrid": "midas_models/dpt_hybrid-midas-501f0c75.pt",
    "midas_v21": "",
    "midas_v21_small": "",
}
Transform = Callable[[Mapping[str, Any]], dict[str, Any]]

api = sys.modules[__name__]  # this module is `ldm.modules.midas.api`, too


def load_midas_transform(model_type: str) -> Transform:
    """Build a transform of a sample's `image`: (H, W, 3) in [0, 1] -> (3, H', W'), normalized."""

    def transform(sample: Mapping[str, Any]) -> dict[str, Any]:
        image = torch.as_tensor(np.asarray(sample["image"], dtype=np.float32))
        x = preprocess_for_midas(2 * image.permute(2, 0, 1)[None] - 1)[0]
        return {**sample, "image": x.contiguous().numpy()}

    return transform


def load_model(model_type: str) -> tuple[nn.Module, Transform]:
    """Build a depth network and its transform.

    Weights are read from the file `ISL_PATHS[model_type]` if it exists; else they are random, until
    the checkpoint of a depth-to-image model is loaded.

    Raises:
        ArgumentError: `model_type` is not "dpt_hybrid".
    """
    network = MiDaSDepth(model_type=model_type).model
    assert network is not None
    path = Path(ISL_PATHS[model_type])
    if path.is_file():
        network.load_state_dict(read_checkpoint(path).state_dict)
    return network.eval(), load_midas_transform(model_type)


class MiDaSInference(nn.Module):
    """Images (B, 3, H, W) of `load_midas_transform` -> relative inverse depth (B, 1, H, W)."""

    MODEL_TYPES_ISL: ClassVar = list(ISL_PATHS)

    def __init__(self, model_type: str) -> None:
        super().__init__()
        assert model_type in self.MODEL_TYPES_ISL, f"unknown depth model `{model_type}`"
        self.model, _ = api.load_model(model_type)
        self.requires_grad_(False)

    @classmethod
    def from_network(cls, network: nn.Module) -> "MiDaSInference":
        """Build an instance that runs an existing network."""
        inference = cls.__new__(cls)
        nn.Module.__init__(inference)
        inference.model = network.eval()
        return inference.requires_grad_(False)

    def train(self, mode: bool = True) -> "MiDaSInference":
        """Stay in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        depth: Tensor = self.model(x)
        if depth.dim() == 3:
            depth = depth[:, None]
        if depth.shape[-2:] != x.shape[-2:]:
            depth = F.interpolate(depth, size=x.shape[-2:], mode="bicubic", align_corners=False)
        return depth
