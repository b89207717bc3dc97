"""Everything that a run is, as one whole that can be saved and continued.

    model, average (EMA), optimizer, generator of noise, step, records seen, seconds trained

A file is written beside its final name and renamed, so a crash never leaves half of one.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.train.ema import EMA

__all__ = ["State"]


class State:
    """The resumable state of one training run.

    trained: the module whose parameters are trained; frozen ones belong to nobody's state.
    position: records consumed by this process, the place in the data's `Order`.
    seconds: time spent training, over all sessions.
    """

    def __init__(
        self, trained: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, *, seed: int
    ) -> None:
        self.trained, self.optimizer, self.ema = trained, optimizer, ema
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.position, self.seconds = 0, 0, 0.0

    def save(self, path: Path) -> None:
        """Writes the whole state to `path`, or nothing."""
        content = {
            "trained": self.trained.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continues from a file of `save`."""
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.trained.load_state_dict(content["trained"])
        self.ema.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["generator"])
        for key in ("step", "position", "seconds"):
            setattr(self, key, content[key])
