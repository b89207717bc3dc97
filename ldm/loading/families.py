"""Recognize the published family of weights, with its config and task, and the prediction type.

Families differ in shapes: input channels of the UNet, dimensions of the context and of the vector
embedding; those of SDXL also in the number of transformer blocks, or in marker tensors. Shapes do
not show whether a model predicts eps or v, so several independent methods detect it:

    marker   a tensor such as `v_pred`, or `modelspec.prediction_type` in the file's metadata
    family   all published models of the family predict the same
    step     `global_step` of the published SD 2 files
    bias     standard deviation of one norm's bias in the last block, small in SD 2's eps models
    name     SD-Turbo predicts eps
    probe    one UNet pass on a constant input: a v-prediction model returns about -x

Names of weights are ours (`weight_names.rename_weights`).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.loading.files.checkpoint import to_ema_name
from ldm.loading.weight_names import UNET_PREFIX, select_prefix, to_original_name

__all__ = [
    "CONFIG_DIR", "FAMILIES", "LATENT_UPSCALER", "PREDICTION_TYPES", "VAE_CONV_IN",
    "DetectedPredictionType", "Detection", "Family", "detect_family", "detect_prediction_type",
    "probe_prediction_type",
]  # fmt: skip

CONFIG_DIR = "configs/stable-diffusion"
SDXL_CONFIG_DIR = "configs/stable-diffusion-xl"
LDM_CONFIG_DIR = "configs/latent-diffusion"


@dataclass(frozen=True)
class Family:
    """A published family: its shapes, configs and task.

    Args:
        title: Name in messages.
        in_channels: Input channels of the UNet.
        context_dim: Dimension of the context of cross-attention; None = no context.
        vector_dim: Dimension of the vector (class) embedding; None = no such embedding.
        prediction_type: "eps", "v" or "edm", of all its models without a marker; None = its models
            differ.
        config: Name of its YAML without `.yaml`; "" = the family is not supported.
        config_v: Name of another YAML for its v-prediction models; "" = the same YAML.
        task: Name of its function in `ldm.pipelines`.
        has_vision_tower: Whether it is conditioned on CLIP's vision tower instead of text.
        num_blocks: Number of transformer blocks; None = any number.
        model_channels: Channels of the first level of the UNet; None = any number.
        marker: Name of a tensor that only models of this family have; "" = no such tensor.
        image_channels: Channels of the autoencoder's images: 3, or more with depth.
    """

    name: str
    title: str
    in_channels: int
    context_dim: int | None
    vector_dim: int | None
    prediction_type: str | None
    config: str
    config_v: str = ""
    task: str = "txt2img"
    has_vision_tower: bool = False
    num_blocks: int | None = None
    model_channels: int | None = None
    marker: str = ""
    image_channels: int = 3

    @property
    def is_sdxl(self) -> bool:
        """Whether it is a family of Stable Diffusion XL."""
        return self.vector_dim in (2816, 2560)

    @property
    def is_ldm(self) -> bool:
        """Whether it is a family of latent-diffusion, before Stable Diffusion."""
        return self.name.startswith("ldm-")

    def get_config_path(self, prediction_type: str | None) -> str:
        """Return the path of the YAML for models that predict "eps", "v" or "x0"."""
        name = self.config_v if prediction_type == "v" and self.config_v else self.config
        folder = SDXL_CONFIG_DIR if self.is_sdxl else CONFIG_DIR
        return f"{LDM_CONFIG_DIR if self.is_ldm else folder}/{name}.yaml"


# fmt: off
LATENT_UPSCALER = Family("x2", "the x2 latent upscaler of Stable Diffusion", 8, 768, 896, "edm",
                         "x2-latent-upscaler", task="upscale_latent")
FAMILIES = (
    Family("sd1", "Stable Diffusion 1", 4, 768, None, "eps", "v1-inference"),
    Family("sd1-inpainting", "Stable Diffusion 1 inpainting", 9, 768, None, "eps",
           "v1-inpainting-inference", task="inpaint"),
    Family("sd1-variations", "Stable Diffusion 1 image variations", 4, 768, None, "eps",
           "v1-image-variation-inference", task="unclip", has_vision_tower=True),
    Family("ldm3d", "LDM3D (depth of 3 channels)", 4, 768, None, "eps", "ldm3d", image_channels=6),
    Family("ldm3d-4c", "LDM3D (depth of 1 channel)", 4, 768, None, "eps", "ldm3d-4c",
           image_channels=4),
    Family("ldm3d-sr", "LDM3D-SR", 8, 768, None, "eps", "ldm3d-sr", task="upscale_rgbd",
           image_channels=4),
    Family("sd2", "Stable Diffusion 2", 4, 1024, None, None, "v2-inference", "v2-inference-v"),
    Family("sd2-inpainting", "Stable Diffusion 2 inpainting", 9, 1024, None, "eps",
           "v2-inpainting-inference", task="inpaint"),
    Family("sd2-depth", "Stable Diffusion 2 depth", 5, 1024, None, "eps", "v2-midas-inference",
           task="depth2img"),
    Family("x4", "Stable Diffusion x4 upscaler", 7, 1024, 1000, "v", "x4-upscaling",
           task="upscale"),
    LATENT_UPSCALER,
    Family("unclip-l", "Stable unCLIP 2.1 (CLIP ViT-L)", 4, 1024, 1536, "v",
           "v2-1-stable-unclip-l-inference", task="unclip"),
    Family("unclip-h", "Stable unCLIP 2.1 (OpenCLIP ViT-H)", 4, 1024, 2048, "v",
           "v2-1-stable-unclip-h-inference", task="unclip"),
    Family("playground-v2.5", "Playground 2.5", 4, 2048, 2816, "edm", "playground-v2.5",
           num_blocks=70, marker="edm_mean"),
    Family("cosxl", "CosXL", 4, 2048, 2816, "v", "sd_xl_cosxl", num_blocks=70,
           marker="edm_vpred.sigma_max"),
    Family("sdxl", "Stable Diffusion XL", 4, 2048, 2816, "eps", "sd_xl_base", "sd_xl_v",
           num_blocks=70),
    Family("sdxl-inpainting", "Stable Diffusion XL inpainting", 9, 2048, 2816, "eps",
           "sd_xl_inpaint", task="inpaint"),
    Family("sdxl-refiner", "Stable Diffusion XL refiner", 4, 1280, 2560, "eps", "sd_xl_refiner",
           task="img2img"),
    Family("ssd-1b", "SSD-1B", 4, 2048, 2816, "eps", "ssd-1b", num_blocks=34),
    Family("segmind-vega", "Segmind Vega", 4, 2048, 2816, "eps", "segmind-vega", num_blocks=15),
    Family("koala", "a pruned Stable Diffusion XL such as KOALA", 4, 2048, 2816, "eps", "",
           task=""),
    Family("sd1-pix2pix", "Stable Diffusion 1 InstructPix2Pix", 8, 768, None, "eps", "", task=""),
    Family("ldm-unconditional", "an unconditional model of latent-diffusion", 3, None, None, "eps",
           "celebahq-ldm-vq-4", task="uncond2img", model_channels=224),
    Family("ldm-churches", "the unconditional model of churches of latent-diffusion", 4, None, None,
           "eps", "lsun_churches-ldm-kl-8", task="uncond2img", model_channels=192),
    Family("ldm-classes", "the class-conditional model cin256 of latent-diffusion", 4, 512, None,
           "eps", "cin-ldm-vq-f8", task="class2img", model_channels=256),
    Family("ldm-classes-v2", "the class-conditional model cin256-v2 of latent-diffusion", 3, 512,
           None, "eps", "cin256-v2", task="class2img", model_channels=192),
    Family("ldm-text", "the text-to-image model text2img256 of latent-diffusion", 3, 640, None,
           "eps", "text2img256", model_channels=192),
    Family("ldm-text-large", "the large text-to-image model of latent-diffusion", 4, 1280, None,
           "eps", "txt2img-1p4B-eval", model_channels=320),
    Family("ldm-layout", "the layout model of latent-diffusion", 3, 512, None, "eps",
           "layout2img-openimages256", task="layout2img", model_channels=128),
    Family("ldm-semantic", "a semantic synthesis model of latent-diffusion", 6, None, None, "eps",
           "semantic_synthesis256", task="semantic2img", model_channels=128),
    Family("ldm-super-resolution", "the super-resolution model of latent-diffusion", 6, None, None,
           "eps", "bsr_sr", task="super_resolve", model_channels=160),
    Family("ldm-inpainting", "the inpainting model of latent-diffusion", 7, None, None, "eps",
           "inpainting_big", task="inpaint", model_channels=256),
    Family("ldm-retrieval", "a retrieval-augmented model of latent-diffusion", 16, 768, None, "eps",
           "rdm768x768", task="knn2img", model_channels=448),
    Family("sdxl-pix2pix", "Stable Diffusion XL InstructPix2Pix", 8, 2048, 2816, "eps", "",
           task=""),
)
# fmt: on

# `global_step` in the published files of SD 2: 512-base-ema, v2-1_512-*, v2-1_768-*.
GLOBAL_STEPS = {875_000: "eps", 220_000: "eps", 110_000: "v"}
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # by diffusers' name
VAE_CONV_IN = "autoencoder.encoder.conv_in.weight"
VISION_PROJECTION = "conditioner.text.model.visual.proj"
NORM_BIAS = "unet.output_blocks.11.1.transformer_blocks.0.norm1.bias"
# Names in the UNet of the original and of diffusers, without dots, as in `model_ema.*`.
INPUT_CONVS = ("input_blocks00weight", "conv_inweight")
# Names that only the UNet of the x2 latent upscaler has: in k-diffusion, and in diffusers.
UPSCALER_NAMES = frozenset({"inner_modelmapping_condweight", "time_projweight"})
# Weight of the first layer of the vector embedding -> axis of its dimension: 1 of a linear layer
# (out, in), 0 of an embedding of class numbers (classes, out).
VECTOR_AXES = {
    "label_emb00weight": 1, "class_embeddinglinear_1weight": 1, "add_embeddinglinear_1weight": 1,
    "label_embweight": 0, "class_embeddingweight": 0,
}  # fmt: skip
CROSS_ATTENTION_KEY = "attn2to_kweight"
SD_TURBO_PATTERN = re.compile(r"sd[-_ ]?turbo")
# Thresholds of the methods "bias" and "probe". 0.09, as in ComfyUI, is between the values of all
# published models of SD 2; -1 is A1111's.
BIAS_THRESHOLD = 0.09
PROBE_THRESHOLD = -1.0


@dataclass(frozen=True)
class Detection:
    """The prediction type by one method.

    Args:
        method: A name in the docstring of this module.
        value: "eps", "v", "x0" or "edm"; None = the method found nothing.
        evidence: What the result is based on, for messages.
    """

    method: str
    value: str | None
    evidence: str


@dataclass(frozen=True)
class DetectedPredictionType:
    """The prediction type by the most reliable method that found one.

    Args:
        value: "eps", "v", "x0" or "edm"; None = unknown.
        detections: Results of all methods, the most reliable first.
    """

    value: str | None
    detections: tuple[Detection, ...] = ()

    @property
    def is_disputed(self) -> bool:
        """Whether two methods contradict each other."""
        return len({detection.value for detection in self.detections if detection.value}) > 1

    @property
    def num_results(self) -> int:
        """Number of methods that found a prediction type."""
        return sum(detection.value is not None for detection in self.detections)

    def __str__(self) -> str:
        results = [f"{d.method}: {d.value or 'nothing'} ({d.evidence})" for d in self.detections]
        return f"{self.value or 'unknown'} by {'; '.join(results)}"


def detect_family(
    state_dict: Mapping[str, Tensor],
    ema_state_dict: Mapping[str, Tensor] | None = None,
    markers: Collection[str] = (),
) -> Family | None:
    """Return the family of weights; None if no published family has these shapes.

    Args:
        state_dict: Weights under our names, or under diffusers' names with our prefixes.
        ema_state_dict: `model_ema.*`, used if `state_dict` has no UNet; None = no EMA weights.
        markers: Names of marker tensors in the file.
    """
    unet = select_prefix(state_dict, UNET_PREFIX)
    if not unet and ema_state_dict:
        unet = select_prefix(ema_state_dict, to_ema_name(to_original_name(UNET_PREFIX)))
    shapes = {name.replace(".", ""): value.shape for name, value in unet.items()}
    if not UPSCALER_NAMES.isdisjoint(shapes):
        return LATENT_UPSCALER
    conv_shape = next((shapes[name] for name in INPUT_CONVS if name in shapes), None)
    if conv_shape is None or len(conv_shape) != 4:
        return None
    key_shapes = [shape for name, shape in shapes.items() if name.endswith(CROSS_ATTENTION_KEY)]
    context_dim = key_shapes[0][1] if key_shapes else None
    vector_dim = next((shapes[n][axis] for n, axis in VECTOR_AXES.items() if n in shapes), None)
    dims = (conv_shape[1], context_dim, vector_dim)
    image_channels = state_dict[VAE_CONV_IN].shape[1] if VAE_CONV_IN in state_dict else 3
    for family in FAMILIES:
        if (
            (family.in_channels, family.context_dim, family.vector_dim) == dims
            and family.has_vision_tower == (VISION_PROJECTION in state_dict)
            and family.image_channels == image_channels
            and family.num_blocks in (None, len(key_shapes))
            and family.model_channels in (None, conv_shape[0])
            and (not family.marker or family.marker in markers)
        ):
            return family
    return None


def detect_prediction_type(
    family: Family | None,
    state: Mapping[str, Tensor],
    step: int | None,
    metadata: Mapping[str, str],
    name: str = "",
) -> DetectedPredictionType:
    """Detect the prediction type by all methods that do not run the network.

    Args:
        family: None = unknown.
        step: Training step; None = unknown.
        metadata: Metadata of the file, with the names of its marker tensors as keys.
        name: Name of the file or folder.
    """
    detections = list(_detect_by_marker(metadata))
    if family is not None and family.prediction_type:
        # A fine-tune may have another prediction type, which only a marker shows. Markers do not
        # apply to EDM: metadata and diffusers' schedulers call it "epsilon" or "sample".
        if detections and family.prediction_type != "edm":
            return _rank_detections(detections)
        return _rank_detections([Detection("family", family.prediction_type, family.title)])
    if family is not None:
        detections.append(Detection("step", GLOBAL_STEPS.get(step or 0), f"global_step {step}"))
        detections.append(_detect_by_bias(state))
        if SD_TURBO_PATTERN.search(name.lower()):
            detections.append(Detection("name", "eps", name))
    return _rank_detections(detections)


@torch.no_grad()
def probe_prediction_type(
    unet: nn.Module, prediction_type: DetectedPredictionType, context_dim: int = 1024
) -> DetectedPredictionType:
    """Return a prediction type with the result of the method "probe" added: one UNet pass.

    At the last timestep z_t is almost pure noise, eps is nearly z_t, and v nearly minus the image.
    """
    weight = next(unet.parameters())
    x = torch.full((1, 4, 8, 8), 0.5, device=weight.device, dtype=weight.dtype)
    context = torch.full((1, 2, context_dim), 0.5, device=weight.device, dtype=weight.dtype)
    output = unet(x, torch.tensor([999], device=weight.device), context=context)
    shift = float((output.float() - x.float()).mean())
    value = None
    if math.isfinite(shift):  # half precision may overflow
        value = "v" if shift < PROBE_THRESHOLD else "eps"
    detection = Detection("probe", value, f"mean shift {shift:.3f}, v below {PROBE_THRESHOLD:g}")
    return _rank_detections([*prediction_type.detections, detection])


def _detect_by_marker(metadata: Mapping[str, str]) -> Iterator[Detection]:
    name = metadata.get("modelspec.prediction_type", "")
    value = PREDICTION_TYPES.get(name, name)  # some programs write "eps" or "v"
    if "edm_mean" in metadata:
        yield Detection("marker", "edm", "`edm_mean`")
    elif "edm_vpred.sigma_max" in metadata:
        yield Detection("marker", "v", "`edm_vpred.sigma_max`")
    elif "v_pred" in metadata:
        yield Detection("marker", "v", f"`{name or 'v_pred'}`")
    elif value in PREDICTION_TYPES.values():
        yield Detection("marker", value, f"`{name}`")


def _detect_by_bias(state: Mapping[str, Tensor]) -> Detection:
    if NORM_BIAS not in state:
        return Detection("bias", None, "no such layer")
    std = float(state[NORM_BIAS].float().std())
    value = "v" if std > BIAS_THRESHOLD else "eps"
    return Detection("bias", value, f"std {std:.4f}, v above {BIAS_THRESHOLD}")


def _rank_detections(detections: list[Detection]) -> DetectedPredictionType:
    """Sort detections by the reliability of their methods; the first with a value applies."""
    methods = ("marker", "family", "step", "name", "probe", "bias")
    ranked = sorted(detections, key=lambda detection: methods.index(detection.method))
    value = next((detection.value for detection in ranked if detection.value), None)
    return DetectedPredictionType(value, tuple(ranked))
