"""List published weights, and download them by name.

    ldm download                                    # list all
    ldm download sd-v2-1                            # then: ldm txt2img --ckpt sd-v2-1
    ldm download hf:OWNER/NAME/FILE                 # any other file of the Hugging Face hub
    ldm download hf:OWNER/NAME                      # or a diffusers folder

Files are saved in the hub's cache ($HF_HUB_CACHE), interrupted downloads are resumed, and the
SHA-256 is verified. $HF_ENDPOINT, $HF_TOKEN and $HF_HUB_OFFLINE are respected.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence

from ldm.loading.published import download_checkpoint, find_on_disk, read_published_files
from ldm.runtime.command import CommandParser

__all__ = ["main"]

LEGEND = """
memory: size of the weights in half precision; a 512 x 512 image adds about 1 GB
unverified: no SHA-256 was published; the hash of the first download is kept, and shown here
Using a file means accepting its license: read it on the page of the file."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(prog=prog, description=__doc__, usage="%(prog)s [flags] [NAME ...]")
    parser.add_argument("names", nargs="*", metavar="NAME", help="name or hf: address to download")
    return parser.run(_download, argv)


def _download(args: Namespace) -> None:
    for name in args.names:
        print(download_checkpoint(name))
    if not args.names:
        print("\n".join([*_list_files(), LEGEND]))


def _list_files() -> Iterator[str]:
    yield f"{'name':24} {'title':42} {'size':>8} memory  {'license':20} on this machine"
    for file in read_published_files().values():
        columns = [
            f"{file.name:24}", f"{file.title:42}", f"{file.size_text:>8}",
            f"{file.weights_gb:.1f} GB", f" {file.license:20}", str(find_on_disk(file) or "-"),
        ]  # fmt: skip
        if not file.sha256:
            columns.append(f"(unverified {file.expected_sha256 or ''}".rstrip() + ")")
        yield " ".join(columns)
