"""Make variations of a picture, or a mix of several.

    python scripts/unclip.py --ckpt sd21-unclip-h.ckpt --image cat.png
    python scripts/unclip.py --ckpt sd21-unclip-l.ckpt --image cat.png --image sea.png --weight 2 \\
        --weight 1 --prompt "an oil painting"

With --prior, unCLIP-L also sees what the Karlo prior imagines of the prompt. Models of SD 1 that
were made for image variations work as well, without text.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ldm.generate import flags, inputs, load, run

PARSER = flags.parser(
    __doc__,
    flags.unclip_flags(),
    flags.prompt_flags(),
    flags.model_flags(),
    flags.sampling_flags(),
    flags.output_flags(),
    task="unclip",
    prompt="",
    outdir="outputs/unclip-samples",
    n_samples=2,
    n_iter=1,
    usual_scale=10.0,
    steps=20,
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
