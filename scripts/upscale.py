"""Enlarge a picture four times.

    python scripts/upscale.py --ckpt x4-upscaler-ema.safetensors --init-img small.png \\
        --prompt "a white cat"

Large pictures are made of overlapping patches: --tile says of how many pixels of the result.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ldm.generate import flags, inputs, load, run

PARSER = flags.parser(
    __doc__,
    flags.picture_flags(),
    flags.upscale_flags(),
    flags.prompt_flags(),
    flags.model_flags(),
    flags.sampling_flags(),
    flags.output_flags(),
    task="upscale",
    prompt="a high quality professional photograph",
    outdir="outputs/upscale-samples",
    n_samples=1,
    n_iter=1,
)


def generate(args: Namespace) -> None:
    batches = run.plan(args)
    told = inputs.read(args)
    model = load.load(args)
    make = run.maker(inputs.pipeline(args, model, told), model, args, told)
    run.run(make, batches, model, args)


def main(argv: Sequence[str] | None = None) -> int:
    return load.run(generate, PARSER, argv)


if __name__ == "__main__":
    sys.exit(main())
