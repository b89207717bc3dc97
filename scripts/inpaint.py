"""Paint a part of a picture anew.

    python scripts/inpaint.py --ckpt 512-inpainting-ema.ckpt --init-img dog.png --mask mask.png \\
        --prompt "a cat on a bench"
    python scripts/inpaint.py --ckpt 512-inpainting-ema.ckpt --init-img dog.png \\
        --mask-box 64,64,256,256
    python scripts/inpaint.py --ckpt 512-inpainting-ema.ckpt --indir pairs --outdir painted

White is painted anew, or what is transparent; all other pixels come back as they were. A model
that was not made for it works as well, held to the known part at every step.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ldm.generate import flags, inputs, load, run

PARSER = flags.parser(
    __doc__,
    flags.picture_flags(strength=1.0),
    flags.mask_flags(),
    flags.prompt_flags(),
    flags.model_flags(),
    flags.sampling_flags(),
    flags.output_flags(),
    task="inpaint",
    prompt="",
    outdir="outputs/inpaint-samples",
    n_samples=1,
    n_iter=1,
    usual_scale=10.0,
)


def generate(args: Namespace) -> None:
    batches, model = run.plan(args), None
    args.skip_grid |= args.indir is not None  # every picture has its own name
    for picture, mask in inputs.pairs(args):
        args.init_img, args.mask = picture, mask
        told = inputs.read(args)
        model = model or load.load(args)
        make = run.maker(inputs.pipeline(args, model, told), model, args, told)
        run.run(make, batches, model, args, inputs.kept(told))


def main(argv: Sequence[str] | None = None) -> int:
    return load.run(generate, PARSER, argv)


if __name__ == "__main__":
    sys.exit(main())
