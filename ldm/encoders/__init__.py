"""Conditioning encoders: each turns one entry of a batch into one slot of `Cond`.

Reading order:

    tokenizer                 text -> token ids
    towers                    CLIP's transformers
    chunks, weighting         long and weighted prompts
    text                      text encoders
    wordpiece, bert           tokenizer and text encoder of latent-diffusion
    boxes                     boxes of objects -> tokens for that encoder
    image                     image encoders, noise augmentation of embeddings
    concat_images             images, masks and segmentation maps concatenated to the latent,
                              noise levels as conditions
    depth, dpt                depth maps concatenated to the latent
    sizes, labels             numbers, class labels, tensors as they are
    safety                    the safety checker, which does not condition anything

open_clip (for its vocabulary) and timm are imported only here. Nothing is downloaded, and all
encoders can be built on the meta device.
"""
