"""Networks with trainable parameters, and the layers they are built of.

Reading order; a file imports only from those before it, and from `ldm.runtime`:

    cpu                     layers on x86 CPUs, faster than torch's own
    attention               attention(q, k, v) by one of several backends
    circular                circular padding, for seamless images
    blocks                  layers, norms, residual blocks, timestep embedding
    transformer             self- and cross-attention of the UNet
    perturbation, freeu     modifications of one forward pass of the UNet
    unet                    UNet
    latent_upscaler         LatentUpscalerUNet
    quantizer               codebook of AutoencoderVQ
    autoencoder             AutoencoderKL, AutoencoderVQ
    tiny_autoencoder        TinyAutoencoder
    karlo                   prior of unCLIP models
    discriminator, lpips    networks in losses of the autoencoder
    inception               features for FID
    lora, lycoris           LoRA and other adapters for any of these
    tiled                   any function applied to tiles of a large tensor

Parameter names are those of the original, CompVis' `ldm`, so that published weights load unchanged.
Networks take and return tensors; files, noise schedules and prompts belong to other packages.
"""
