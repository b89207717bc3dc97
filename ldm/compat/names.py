"""Modules of the original: which modules of `ldm.compat` replace them, and which are missing."""

from itertools import accumulate

# Module of the original -> module of `ldm.compat`
MODULES = {
    "ldm.models.autoencoder": "autoencoder",
    "ldm.models.diffusion.ddim": "ddim",
    "ldm.models.diffusion.ddpm": "ddpm",
    "ldm.models.diffusion.dpm_solver": "dpm_solver",
    "ldm.models.diffusion.dpm_solver.dpm_solver": "dpm_solver",
    "ldm.models.diffusion.dpm_solver.sampler": "dpm_solver",
    "ldm.models.diffusion.plms": "plms",
    "ldm.models.diffusion.sampling_util": "sampling_util",
    "ldm.modules.losses": "losses",
    "ldm.modules.losses.contperceptual": "losses",
    "ldm.util": "util",
    "ldm.lr_scheduler": "lr_scheduler",
    "ldm.data.base": "data",
    "ldm.data.util": "data",
    "ldm.modules.diffusionmodules.upscaling": "upscaling",
    "ldm.modules.encoders.modules": "encoders",
    "ldm.modules.midas": "midas",
    "ldm.modules.midas.api": "midas",
    "ldm.modules.attention": "attention",
    "ldm.modules.diffusionmodules.model": "model",
    "ldm.modules.diffusionmodules.openaimodel": "openaimodel",
    "ldm.modules.diffusionmodules.util": "diffusion_util",
    "ldm.modules.ema": "ema",
    "ldm.modules.distributions.distributions": "distributions",
}

# Parent packages of MODULES, some of which are in MODULES, too. `ldm` and `ldm.data` are on disk.
PACKAGES = {
    package
    for name in MODULES
    for package in list(accumulate(name.split("."), "{}.{}".format))[1:-1]
} - {"ldm.data"}
DISTRIBUTION = "ldm-revived"
# Packages in which LDM_VENDORED=1 prefers vendored modules, besides those of MODULES
VENDORED_PACKAGES = ("ldm.data.", "ldm.models.", "ldm.modules.")

# Module or class that is missing here -> its alternative, for messages
BERT = "its network is `ldm.encoders.bert.BERTText`"
DEGRADATION = "the degradations of BSRGAN are in https://github.com/cszn/BSRGAN"
KARLO = "the prior of unCLIP is `ldm.nets.karlo`, and is run by `ldm.unclip`"
DATA = "read images with torchvision.datasets, or train with `ldm train` (docs/training.md)"
MIDAS = "MiDaS is `ldm.modules.midas.api`, and its network `ldm.encoders.dpt.DPT`"
T5 = "load it with transformers.T5EncoderModel"
VQ_LOSS = "losses of VQ autoencoders are in `ldm.train.tasks.autoencoder`"
MISSING_MODULES = {
    "ldm.data.imagenet": DATA,
    "ldm.data.lsun": DATA,
    "ldm.models.diffusion.classifier": "it is in https://github.com/CompVis/latent-diffusion",
    "ldm.modules.image_degradation": DEGRADATION,
    "ldm.modules.image_degradation.bsrgan": DEGRADATION,
    "ldm.modules.image_degradation.bsrgan_light": DEGRADATION,
    "ldm.modules.image_degradation.utils_image": DEGRADATION,
    "ldm.modules.karlo": KARLO,
    "ldm.modules.losses.vqperceptual": VQ_LOSS,
    "ldm.modules.midas.midas": MIDAS,
    "ldm.modules.midas.utils": MIDAS,
    "ldm.modules.x_transformer": "the network of BERTEmbedder is `ldm.encoders.bert.BERTText`",
}
# Classes of `ldm.modules.encoders.modules`
MISSING_ENCODERS = {
    "BERTEmbedder": BERT,
    "BERTTokenizer": "its function is `ldm.encoders.wordpiece.tokenize`",
    "TransformerEmbedder": BERT,
    "FrozenT5Embedder": T5,
    "FrozenCLIPT5Encoder": T5,
    "FrozenCLIPTextEmbedder": "its network is `ldm.encoders.text.OpenCLIPText`",
    "FrozenClipImageEmbedder": "its network is `ldm.encoders.image.CLIPImage`",
}
