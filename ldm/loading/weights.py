"""Read weights from a file, a diffusers folder or a run folder, and identify their family.

path -> Checkpoint    names as in the file, of diffusers folders the original's; for folders, the
                      config is added to the metadata
     -> Weights       our names, with family, metadata and prediction type
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ldm.loading.diffusers.files import is_diffusers_folder, read_folder
from ldm.loading.families import Family, Prediction, detect_prediction, recognize_family
from ldm.loading.files.checkpoint import CONFIG_KEY, Checkpoint, read_checkpoint, use_ema_weights
from ldm.loading.published import find_checkpoint
from ldm.loading.variants import find_model_name
from ldm.loading.weight_names import (
    MARKERS,
    has_engine_names,
    rename_weights,
    select_buffers,
    to_original_name,
)
from ldm.runtime.errors import MissingArgument, MissingFile
from ldm.runtime.files import read_text

__all__ = [
    "TRANSPOSED", "Weights", "has_transposed_projection", "identify_weights", "open_checkpoint",
]  # fmt: skip

# Weights and config in the folder of a training run of ours or of the original, see `_find_newest`.
RUN_WEIGHTS = ("checkpoints/last.safetensors", "checkpoints/last.ckpt", "checkpoints/*.safetensors",
               "checkpoints/*.ckpt")  # fmt: skip
RUN_CONFIGS = ("config.yaml", "configs/*-project.yaml")
TRANSPOSED = (
    "text_projection of the second text encoder looks transposed, as in files copied unconverted "
    "from a diffusers folder; it is used as it is, and images follow the prompt less well"
)
PROJECTIONS = tuple(f"conditioner.{name}.model.text_projection" for name in ("text_2", "text"))
# Entry [0, 1] of the projection in SDXL base if it is transposed; it is 0.0218 otherwise. The
# tolerance is for fine-tunes.
TRANSPOSED_ENTRY, ENTRY_TOLERANCE = -0.0037, 1e-3


@dataclass
class Weights:
    """The weights of a checkpoint under our names, its family and metadata.

    Args:
        source: The checkpoint, with names as in the file.
        state: Weights by our names.
        buffers: Tensors that are not weights, by the original's names: noise schedule, scale factor
            (if training measured it), statistics of embeddings or latents.
        markers: Metadata, and names of marker tensors (`v_pred`) as keys with an empty text.
        family: None = unknown.
        prediction: Prediction type.
        mapped: Whether all tensors are memory-mapped.
    """

    source: Checkpoint
    state: dict[str, Tensor]
    buffers: dict[str, Tensor]
    markers: dict[str, str]
    family: Family | None
    prediction: Prediction
    mapped: bool

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.source.path

    def use_ema(self, names: Iterable[str]) -> None:
        """Replace weights by their EMA, or add them; `names` are the model's."""
        all_names = (*names, *self.state)
        sgm_names = has_engine_names(all_names)
        originals = {to_original_name(name, engine=sgm_names): name for name in all_names}
        use_ema_weights(self.state, self.source.ema_state, originals, self.path)
        step = self.source.step
        name = find_model_name(self.path)
        self.prediction = detect_prediction(self.family, self.state, step, self.markers, name)

    def check_has_unet(self, names: Iterable[str]) -> None:
        """Raise MissingArgument if the UNet has EMA weights only; `names` are the model's."""
        has_raw = any(name.startswith("unet.") for name in self.state)
        if self.source.has_ema and not has_raw and any(name.startswith("unet.") for name in names):
            message = f"`{self.path}` holds only EMA weights of the UNet"
            raise MissingArgument(f"{message}\nhint: load it with `ema`", "ema")


def open_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Open weights, names as in the file; names of diffusers folders become the original's.

    For folders, their config is added to the metadata.

    Args:
        path: A .ckpt or .safetensors, a diffusers folder, the folder of a training run, or a
            published name or `hf:` address for `find_checkpoint`.
        variant: Variant in the file names of a diffusers folder, such as `fp16`; None = see
            `read_folder`.

    Raises:
        MissingFile: There is no such file, or no weights in the folder.
        ValueError: The file does not contain weights.
    """
    local_path = find_checkpoint(path, variant=variant)
    if not local_path.is_dir():
        return read_checkpoint(local_path)
    if is_diffusers_folder(local_path):
        return read_folder(local_path, variant)
    weights, config = _find_newest(local_path, RUN_WEIGHTS), _find_newest(local_path, RUN_CONFIGS)
    if weights is None:
        raise MissingFile(
            f"`{path}` is neither a diffusers folder (`model_index.json`) nor the folder of a "
            "training run (`checkpoints/last.ckpt`)"
        )
    file = read_checkpoint(weights)
    if config is None or CONFIG_KEY in file.metadata:
        return file
    return replace(file, metadata=file.metadata | {CONFIG_KEY: read_text(config)})


def identify_weights(source: Checkpoint) -> Weights:
    """Return the weights under our names, with their family and prediction type."""
    state, buffers = rename_weights(source.state), select_buffers(source.state)
    markers = source.metadata | {name: "" for name in MARKERS if name in source.state}
    family = recognize_family(state, source.ema_state, markers)
    name = find_model_name(source.path)
    prediction = detect_prediction(family, state, source.step, markers, name)
    return Weights(source, state, buffers, markers, family, prediction, source.mapped)


def has_transposed_projection(state: Mapping[str, Tensor]) -> bool:
    """Return whether the projection of SDXL's second text encoder is transposed by mistake.

    This happens in files that other tools convert from diffusers folders. It is recognised by a
    number that nearly all fine-tunes leave unchanged.

    Args:
        state: Weights of a file in the original's layout, under our names.
    """
    projection = next((state[name] for name in PROJECTIONS if name in state), None)
    if projection is None or tuple(projection.shape) != (1280, 1280):
        return False
    return abs(float(projection[0, 1]) - TRANSPOSED_ENTRY) < ENTRY_TOLERANCE


def _find_newest(folder: Path, patterns: Iterable[str]) -> Path | None:
    """Return the newest file of the first pattern that matches any."""
    for pattern in patterns:
        if files := list(folder.glob(pattern)):
            return max(files, key=lambda file: file.stat().st_mtime)
    return None
