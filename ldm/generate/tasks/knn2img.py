"""Images from text and its neighbors, by retrieval-augmented models of latent-diffusion."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.generate.groups import Inputs
from ldm.generate.option_parsers import parse_count
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import PreparedTask, Task, drop_prompt_options
from ldm.runtime.errors import ArgumentError, MissingArgument, errors_about

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.encoders.towers import CLIP
    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


@dataclass(frozen=True)
class NeighborInputs(Inputs):
    """CLIP, and the database of neighbors."""

    # fmt: off
    clip: str | None = option(None, "--clip", metavar="FILE", is_input_file=True, label="CLIP",
        help="OpenAI's CLIP ViT-L/14, ViT-L-14.pt, or an open_clip or transformers file of it")
    database: str | None = option(None, "--database", metavar="FILE", label="Database",
        help="embeddings of images, an .npz of the original or a folder of them (default: none,"
        " only the prompt)")
    knn: int = option(10, "--knn", parse=parse_count, metavar="N", label="Neighbors",
        help="number of neighbors of the prompt, with --database; up to 20 for the published model"
        " (default: %(default)s)")
    # fmt: on


class Knn2ImgTask(PreparedTask):
    """Images from text and its neighbors."""

    def __init__(self, request: Request) -> None:
        from ldm.loading.addons.clip import check_clip
        from ldm.pipelines.retrieval import load_database

        super().__init__(request)
        self.inputs = inputs = request.get_inputs(NeighborInputs)
        if inputs.clip is None:
            raise MissingArgument("a CLIP model is missing, such as ViT-L-14.pt", "clip")
        if request.prompts.negative_prompt:
            raise ArgumentError(f"{request.task.name} takes no negative prompt", "negative_prompt")
        with errors_about("clip"):
            check_clip(inputs.clip)
        self.database: Tensor | None = None
        if inputs.database is not None:
            with errors_about("database"):
                self.database = load_database(inputs.database)
        self._clip: CLIP | None = None

    def set_up(self, model: "LatentDiffusion") -> None:
        from ldm.loading.addons.clip import load_clip

        with errors_about("clip"):
            self._clip = load_clip(self.inputs.clip or "", device=model.device)

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        import torch

        from ldm import pipelines
        from ldm.pipelines.retrieval import find_neighbors

        assert self._clip is not None, "`set_up` loads it"
        embeddings = self._clip.embed_texts(prompts)[:, None]  # (B, 1, D)
        if self.database is not None:
            neighbors = find_neighbors(embeddings[:, 0].cpu(), self.database, self.inputs.knn)
            embeddings = torch.cat([embeddings, neighbors.to(embeddings)], dim=1)  # (B, 1 + k, D)
        return pipelines.knn2img(
            model,
            list(embeddings),
            scale=options["scale"],
            size=self.get_output_size(model),
            **drop_prompt_options(options),
        )


TASK = Task(
    name="knn2img",
    title="knn2img",
    summary="""Make images from text and its neighbors in a database of images.

    ldm knn2img --ckpt models/rdm/rdm768x768 --clip ViT-L-14.pt --prompt "a happy bear"
    ldm knn2img --ckpt models/rdm/rdm768x768 --clip ViT-L-14.pt --prompt "a happy bear" \\
        --database data/rdm/retrieval_databases/artbench-surrealism --knn 10

The retrieval-augmented model of latent-diffusion reads CLIP embeddings of the prompt and of similar
images. Neighbors are found exactly; indexes of ScaNN are not needed.
""",
    inputs=NeighborInputs,
    prepare=Knn2ImgTask,
    families=("retrieval",),
    defaults={"outdir": "outputs/knn2img-samples", "n_iter": 1},
    scale=5.0,
    example_flags="--ckpt models/rdm/rdm768x768",
    is_on_page=False,
)
