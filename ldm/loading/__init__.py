"""Load models from configs and weights, and convert between formats.

`load` is the entry point. It reads weights (`weights`, `files`), recognises published families
(`families`), reads the YAML (`model_config`, `config`; `legacy` and `sgm` translate the original's
class names), finds few-step models (`find_variant`, `variants`), takes parts from other files
(`replace_parts`), and adds LoRAs and embeddings (`addons`). `published` and `hub` find and download
checkpoints by name. `diffusers` reads and writes diffusers folders, `convert` converts between
formats, `inspection` describes a file.

"The original" is the `ldm` of CompVis and Stability AI, sgm their `generative-models`; "our names"
of weights are those of this package's modules.

No code named in a file is executed: targets are looked up in a table, and pickles are read by a
restricted unpickler. Only `hub` uses the network.
"""
