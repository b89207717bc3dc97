"""Change a picture toward a prompt and keep its depth.

    python scripts/depth2img.py --ckpt 512-depth-ema.ckpt --init-img room.png \\
        --prompt "a room made of ice"

The depth is estimated by the model's own network, or comes from --depth-map.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ldm.generate import flags, inputs, load, run

PARSER = flags.parser(
    __doc__,
    flags.picture_flags(strength=0.9),
    flags.depth_flags(),
    flags.prompt_flags(),
    flags.model_flags(),
    flags.sampling_flags(),
    flags.output_flags(),
    task="depth2img",
    prompt="a professional photograph of an astronaut",
    outdir="outputs/depth2img-samples",
    n_samples=1,
    n_iter=1,
)


def generate(args: Namespace) -> None:
    batches = run.plan(args)
    told = inputs.read(args)
    model = load.load(args)
    pipeline = inputs.pipeline(args, model, told)
    if args.save_depth:
        from ldm.imaging.reading import save_depth
        from ldm.pipelines import depth_of

        save_depth(args.save_depth, depth_of(model, told["image"]))
    run.run(run.maker(pipeline, model, args, told), batches, model, args)


def main(argv: Sequence[str] | None = None) -> int:
    return load.run(generate, PARSER, argv)


if __name__ == "__main__":
    sys.exit(main())
