"""Variations and mixes of images, by unCLIP and image variation models."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ldm.generate.groups import Inputs
from ldm.generate.option_parsers import parse_count, parse_natural, parse_number
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import PreparedTask, Task
from ldm.prompts import PLAIN
from ldm.runtime.errors import ArgumentError, MissingArgument, errors_about

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.nets.karlo import Prior
    from ldm.pipelines.options import TaskOptions, UnguidedOptions

PRIOR_SEED_OFFSET = 1 << 32  # added to seeds, so that the prior's noise differs from that of images


@dataclass(frozen=True)
class UnclipInputs(Inputs):
    """Images, and how to mix them."""

    # fmt: off
    init_img: tuple[str, ...] = option((), "--image", "--init-img", is_list=True,
        is_input_file=True, metavar="FILE", label="Images",
        help="input image; may be given several times")
    weight: tuple[float, ...] = option((), "--weight", parse=parse_number, is_list=True,
        metavar="W", label="Image weights",
        help="weight of each image, then of the prior (default: equal weights)")
    noise_level: tuple[int, ...] = option((), "--noise-level", parse=parse_natural, is_list=True,
        metavar="N", label="Noise level (0 – 999)", slider_max=999,
        help="timestep of the noise on the embeddings, 0 to 999, for all or for each (default: 0)")
    mix_noise_level: int | None = option(None, "--mix-noise-level", parse=parse_natural,
        metavar="N", label="Mix noise level",
        help="timestep of the noise on the mix of embeddings (default: no noise)")
    prior: str | None = option(None, "--prior", metavar="FILE", is_input_file=True,
        help="file of the Karlo prior, which samples an image embedding for the prompt")
    prior_steps: int = option(25, "--prior-steps", parse=parse_count, metavar="N",
        help="sampling steps of the prior (default: %(default)s)")
    prior_scale: float = option(4.0, "--prior-scale", parse=parse_number, metavar="S",
        help="guidance scale of the prior (default: %(default)s)")
    clip_stats: str | None = option(None, "--clip-stats", metavar="FILE", is_input_file=True,
        help="file with mean and standard deviation of CLIP's embeddings, ViT-L-14_stats.th"
        " (default: from the checkpoint or beside it)")
    # fmt: on


class UnclipTask(PreparedTask):
    """Variations of images, or mixes of them."""

    def __init__(self, request: Request) -> None:
        from ldm.imaging.pixels import to_tensor
        from ldm.imaging.reading import load_image
        from ldm.loading.files.checkpoint import detect_format
        from ldm.pipelines.karlo import check_prior_steps

        super().__init__(request)
        self.inputs = inputs = request.get_inputs(UnclipInputs)
        with errors_about("init_img"):
            self.images = [to_tensor(load_image(path)) for path in inputs.init_img]
        if not self.images and inputs.prior is None:
            raise MissingArgument("an image or a prior is missing", "init_img")
        if inputs.prior is not None and request.prompts.syntax != PLAIN:
            raise ArgumentError("the prior takes prompts of syntax plain only", "syntax")
        if inputs.prior is not None:
            with errors_about("prior"):
                detect_format(Path(inputs.prior))
            with errors_about("prior_steps"):
                check_prior_steps(inputs.prior_steps)
        num_embeddings = len(self.images) + (inputs.prior is not None)
        for name, values, allowed_counts in (
            ("weight", inputs.weight, (0, num_embeddings)),
            ("noise_level", inputs.noise_level, (0, 1, num_embeddings)),
        ):
            if len(values) not in allowed_counts:
                sources = "images and prior" if inputs.prior else "images"
                message = (
                    f"{len(values)} values of {name} were given for {num_embeddings} {sources}"
                )
                raise ArgumentError(message, name)
        self._prior: Prior | None = None

    def set_up(self, model: "LatentDiffusion") -> None:
        from ldm.loading.addons.karlo import load_prior
        from ldm.pipelines.families import find_family, quote_name

        if find_family(model.conditioner) == "variation":
            inputs = self.inputs
            unclip_options = {
                "noise_level": any(inputs.noise_level),
                "mix_noise_level": inputs.mix_noise_level is not None,
                "prior": inputs.prior is not None,
            }
            for name, is_set in unclip_options.items():
                if is_set:
                    message = f"{name} is for unCLIP, which {quote_name(model)} is not"
                    raise ArgumentError(message, name)
        if self.inputs.prior is not None:
            self._prior = load_prior(self.inputs.prior, device=model.device, dtype=model.dtype)

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines
        from ldm.pipelines.families import find_family

        inputs = self.inputs
        size = self.get_output_size(model)
        weights = inputs.weight or None
        if find_family(model.conditioner) == "variation":
            unguided = cast("UnguidedOptions", options)  # `vary` rejects other keyword arguments
            return pipelines.vary(
                model, prompts, self.images, weights=weights, size=size, **unguided
            )
        levels = inputs.noise_level or (0,)
        return pipelines.unclip(
            model,
            prompts,
            self.images,
            embeddings=self._sample_prior(model, prompts, options),
            weights=weights,
            noise_levels=levels[0] if len(levels) == 1 else levels,
            mix_level=inputs.mix_noise_level,
            size=size,
            **options,
        )

    def _sample_prior(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "list[Tensor]":
        from ldm import pipelines

        if self._prior is None:
            return []
        seeds = cast(list[int], options["seeds"])
        embedding = pipelines.sample_prior(
            model,
            self._prior.to(model.dtype),  # float32 after an overflow in half precision
            prompts,
            negative_prompt=options["negative_prompt"],
            steps=self.inputs.prior_steps,
            scale=self.inputs.prior_scale,
            noise_source=pipelines.make_seeded_noise_source(
                [seed + PRIOR_SEED_OFFSET for seed in seeds]
            ),
        )
        return [embedding]


TASK = Task(
    name="unclip",
    title="unCLIP",
    summary="""Make variations of an image, or a mix of several.

    ldm unclip --ckpt sd21-unclip-h.ckpt --image cat.png
    ldm unclip --ckpt sd21-unclip-l.ckpt --image cat.png --image sea.png --weight 2 --weight 1 \\
        --prompt "an oil painting"

With --prior, unCLIP-L also gets an embedding that the Karlo prior samples for the prompt. SD 1
models fine-tuned for image variations work as well, without a prompt.
""",
    inputs=UnclipInputs,
    prepare=UnclipTask,
    families=("unclip", "variation"),
    defaults={"outdir": "outputs/unclip-samples", "n_samples": 2, "n_iter": 1},
    scale=10.0,
    example_flags="--ckpt sd-unclip-h",
)
