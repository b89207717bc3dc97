"""Folders as diffusers keeps them: a model as components, each with a JSON and its weights.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/   …

`places` says where each tensor of ours lives there, `networks`, `encoders` and `schedulers` say the
same sizes in the words of both sides, `index` which components a family has, `files` reads and
writes. Nothing here needs diffusers or transformers.
"""
