"""Change a picture toward a prompt.

    python scripts/img2img.py --init-img sketch.png --strength 0.8 --prompt "a castle by the sea"

Any text-to-image model will do. The picture keeps its size unless --H or --W say otherwise.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ldm.generate import flags, inputs, load, run

PARSER = flags.parser(
    __doc__,
    flags.picture_flags(strength=0.8),
    flags.prompt_flags(),
    flags.model_flags(),
    flags.sampling_flags(),
    flags.output_flags(),
    task="img2img",
    prompt="a painting of a virus monster playing guitar",
    outdir="outputs/img2img-samples",
    n_samples=2,
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
