"""What one run of the app may ask for."""

from dataclasses import dataclass

from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError

__all__ = ["Limits"]

LARGEST_UPSCALED = 4096 * 3072  # pixels that an image may have after upscaling
LONGEST_PROMPT = 2000  # characters, prompt and negative prompt together
LARGEST_MASK_RADIUS = 256  # pixels


@dataclass(frozen=True)
class Limits:
    """Upper bounds.

    Args:
        side: of an image, in pixels.
        steps: sampling steps.
        batch: images in a batch.
        batches: batches in a run.
    """

    side: int = 1024
    steps: int = 150
    batch: int = 4
    batches: int = 8

    def check(self, request: Request) -> None:
        """Raise ArgumentError naming the first option that asks for more."""
        bounds = {
            "steps": (1, self.steps),
            "n_samples": (1, self.batch),
            "n_iter": (1, self.batches),
            "height": (8, self.side),
            "width": (8, self.side),
            "vae_tile": (64, 4 * self.side),
            "unet_tile": (64, 4 * self.side),
            "mask_grow": (0, LARGEST_MASK_RADIUS),
            "mask_blur": (0, LARGEST_MASK_RADIUS),
        }
        values = request.values()
        for name, (low, high) in bounds.items():
            value = values.get(name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(f"{name} is {value:g}, {low} to {high} are allowed", name)
        prompts = request.prompts
        if len(prompts.prompt) + len(prompts.negative_prompt) > LONGEST_PROMPT:
            raise ArgumentError(f"prompts may have {LONGEST_PROMPT} characters together", "prompt")

    def check_output(self, width: int, height: int, enlarges: bool) -> None:
        """Raise ArgumentError if the images would be too large.

        Args:
            enlarges: whether the task enlarges its input.
        """
        if enlarges and width * height > LARGEST_UPSCALED:
            allowed = f"{LARGEST_UPSCALED} pixels are allowed"
        elif not enlarges and max(width, height) > self.side:
            allowed = f"sides up to {self.side} are allowed"
        else:
            return
        raise ArgumentError(
            f"the image would be {width}x{height}, {allowed}: set width or height", "width"
        )
