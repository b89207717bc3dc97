"""Make a picture again from what its PNG says, and compare.

    python scripts/replay.py outputs/txt2img-samples/samples/00000.png

Says `identical` (exit status 0), or by how much the pixels differ and what is not as it was
(exit status 1). --ckpt and --config say where the files are now.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ldm.generate import flags, inputs, load, provenance, run

PARSER = flags.parser(__doc__, flags.model_flags(), task="replay", precision=None)
PARSER.add_argument("picture", help="a PNG that these scripts wrote")
PARSER.add_argument("--output", metavar="FILE", help="save the new picture here")


def replay(given: Namespace) -> int:
    from PIL import Image

    from ldm.imaging.metadata import fingerprint, read_info, write_png

    info = read_info(given.picture)
    args = provenance.flags(info, given)
    told = inputs.read(args)
    model = load.load(args, threads=info["threads"])
    make = run.maker(inputs.pipeline(args, model, told), model, args, told)
    picture = run.again(info, args, model, make, inputs.kept(told))
    if args.output:
        write_png(args.output, picture, info)
    with Image.open(args.picture) as old:
        difference = provenance.compare(old, picture)
        was_edited = fingerprint(old) != info.get("sha256")
    print(difference or "identical")
    if difference is None:
        return 0
    reasons = provenance.changes(info, provenance.describe(args, model))
    reasons += ["the file was edited after it was made"] if was_edited else []
    for reason in reasons or ["nothing that is recorded has changed"]:
        print(f"  {reason}")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    return load.run(replay, PARSER, argv)


if __name__ == "__main__":
    sys.exit(main())
