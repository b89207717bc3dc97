"""Inpainting."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.generate.option_parsers import parse_box, parse_fraction, parse_natural, parse_nonnegative
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import Task
from ldm.generate.tasks.images import DEPTH_SUFFIX, FolderInputs, PreparedImageTask, fit_image
from ldm.runtime.errors import ArgumentError, MissingFile, errors_about

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions

log = logging.getLogger(__name__)

MASK_SUFFIX = "_mask"  # X.png has the mask X_mask.png


@dataclass(frozen=True)
class InpaintInputs(FolderInputs):
    """An image and the part of it to repaint."""

    # fmt: off
    strength: float = option(1.0, "--strength", parse=parse_fraction, metavar="S",
        label="Denoising strength", help="0 keeps the image, 1 ignores it (default: %(default)s)")
    mask: str | None = option(None, "--mask", metavar="FILE", is_input_file=True, label="Mask",
        help="mask: white is repainted (default: the transparent part of the image)")
    mask_box: tuple[int, int, int, int] | None = option(None, "--mask-box", parse=parse_box,
        metavar="L,T,R,B", label="Mask box", help="repaint this box, in pixels")
    mask_grow: int = option(0, "--mask-grow", parse=parse_natural, metavar="N",
        label="Mask expand (px)", slider_max=64,
        help="expand the mask by this many pixels (default: %(default)s)")
    mask_blur: float = option(0.0, "--mask-blur", parse=parse_nonnegative, metavar="R",
        label="Mask blur (px)", slider_max=64,
        help="radius of the mask blur (default: %(default)s)")
    no_composite: bool = option(False, "--no-composite",
        help="do not paste the unmasked pixels of the image back over the decoded ones")
    indir: str | None = option(None, "--indir", metavar="DIR",
        help="all pairs X.png and X_mask.png of a folder (or X.jpg …), each to OUTDIR/X.png")
    # fmt: on

    def list_inputs(self, folder: Path) -> list[FolderInputs]:
        from ldm.imaging.reading import list_images

        for name in ("mask", "mask_box"):
            if vars(self)[name] is not None:
                raise ArgumentError(f"a folder has a mask for each image, leave out {name}", name)
        paths = list_images(folder, "indir")
        mask_paths = [path for path in paths if path.stem.endswith(MASK_SUFFIX)]
        masks = {path.stem.removesuffix(MASK_SUFFIX): path for path in mask_paths}
        suffixes = (MASK_SUFFIX,) if self.depth is None else (MASK_SUFFIX, DEPTH_SUFFIX)
        images = [path for path in paths if not path.stem.endswith(suffixes)]
        for stem in sorted(masks.keys() - {image.stem for image in images}):
            raise MissingFile(f"no image `{stem}` for the mask `{masks[stem]}`", "indir")
        if not masks:
            raise MissingFile(f"no pairs X.png and X{MASK_SUFFIX}.png in `{folder}`", "indir")
        if unmasked := [image.name for image in images if image.stem not in masks]:
            count, example = len(unmasked), unmasked[0]
            log.warning("`%s`: skipped %d images without mask: %s …", folder, count, example)
        return [
            replace(self.with_image(image), mask=str(masks[image.stem]))
            for image in images
            if image.stem in masks
        ]


class InpaintTask(PreparedImageTask):
    """Inpainting; `mask` is (1, 1, H, W) in [0, 1], 1 where pixels are repainted."""

    def __init__(self, request: Request) -> None:
        from ldm.imaging.masks import make_mask
        from ldm.imaging.pixels import to_tensor

        super().__init__(request)
        self.inputs = inputs = request.get_inputs(InpaintInputs)
        assert inputs.init_img is not None  # checked by `load_input_image`
        if inputs.mask is not None and inputs.mask_box is not None:
            raise ArgumentError("give a mask or a mask box, not both", "mask_box")
        mask_argument = "mask_box" if inputs.mask is None else "mask"
        with errors_about("indir" if inputs.is_folder else mask_argument):
            mask = make_mask(
                inputs.init_img, inputs.mask, inputs.mask_box, grow=inputs.mask_grow,
                blur=inputs.mask_blur,
            )  # fmt: skip
        self.mask = (to_tensor(fit_image(request, mask))[:, :1] + 1) / 2

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        return pipelines.inpaint(
            model,
            prompts,
            self.image,
            self.mask,
            strength=self.inputs.strength,
            composite=not self.inputs.no_composite,
            depth=self.depth,
            **options,
        )

    def get_protected_pixels(self) -> "tuple[Image.Image, Image.Image] | None":
        from PIL import Image

        from ldm.imaging.pixels import to_pil

        if self.inputs.no_composite:
            return None
        return to_pil(self.image)[0], Image.fromarray((self.mask[0, 0] > 0).numpy())


TASK = Task(
    name="inpaint",
    title="Inpaint",
    summary="""Repaint a part of an image.

    ldm inpaint --ckpt 512-inpainting-ema.ckpt --init-img dog.png --mask mask.png \\
        --prompt "a cat on a bench"
    ldm inpaint --ckpt 512-inpainting-ema.ckpt --init-img dog.png --mask-box 64,64,256,256
    ldm inpaint --ckpt 512-inpainting-ema.ckpt --indir pairs --outdir painted

White, or the transparent part of the image, is repainted; all other pixels stay as they are. A
text-to-image model works, too: the unmasked part is then replaced before every step. The inpainting
model of latent-diffusion, models/ldm/inpainting_big, reads no prompt.
""",
    inputs=InpaintInputs,
    prepare=InpaintTask,
    families=("inpainting", "text"),
    defaults={"outdir": "outputs/inpaint-samples", "n_samples": 1, "n_iter": 1},
    scale=10.0,
    demo_model="checkpoints/demo-inpainting.safetensors",
    example_flags="--ckpt sd-v2-inpainting",
    uses_numpy_noise=True,
)
