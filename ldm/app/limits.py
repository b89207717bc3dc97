"""Limits of a run of the page, which protect the server."""

from dataclasses import dataclass

from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError

__all__ = ["Limits"]

MAX_UPSCALED_PIXELS = 4096 * 3072  # width x height
MAX_PROMPT_CHARACTERS = 2000  # of all TEXT_OPTIONS together
TEXT_OPTIONS = (
    "prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "source_prompt", "sld_concept",
)  # fmt: skip
MAX_MASK_RADIUS = 256  # pixels


@dataclass(frozen=True)
class Limits:
    """Limits of a run; `max_side` is in pixels."""

    max_side: int = 2048
    max_steps: int = 150
    max_batch_size: int = 4
    max_batches: int = 8

    def check(self, request: Request) -> None:
        """Raise ArgumentError for the first option that is out of bounds."""
        bounds = {
            "steps": (1, self.max_steps),
            "upscaler_steps": (1, self.max_steps),
            "n_samples": (1, self.max_batch_size),
            "n_iter": (1, self.max_batches),
            "height": (8, self.max_side),
            "width": (8, self.max_side),
            "vae_tile": (64, 4 * self.max_side),
            "unet_tile": (64, 4 * self.max_side),
            "mask_grow": (0, MAX_MASK_RADIUS),
            "mask_blur": (0, MAX_MASK_RADIUS),
        }
        values = request.get_values()
        for name, (low, high) in bounds.items():
            if values.get(name) is not None and not low <= values[name] <= high:
                raise ArgumentError(f"{name} must be {low} to {high}, got {values[name]:g}", name)
        if sum(len(values.get(name) or "") for name in TEXT_OPTIONS) > MAX_PROMPT_CHARACTERS:
            message = f"all prompts together are longer than {MAX_PROMPT_CHARACTERS} characters"
            raise ArgumentError(message, "prompt")

    def check_output(self, width: int, height: int, is_upscaled: bool) -> None:
        """Raise ArgumentError if images of this size are too large.

        Args:
            is_upscaled: Whether they were upscaled, for which only the number of pixels is limited.
        """
        is_too_large = max(width, height) > self.max_side
        allowed = f"sides up to {self.max_side}"
        if is_upscaled:
            is_too_large = width * height > MAX_UPSCALED_PIXELS
            allowed = f"{MAX_UPSCALED_PIXELS} pixels"
        if is_too_large:
            message = f"{width}x{height} is too large, {allowed} are allowed: set width or height"
            raise ArgumentError(message, "width")
