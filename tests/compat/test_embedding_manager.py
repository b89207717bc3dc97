"""Textual inversion as in its original code: an embedding manager replaces token embeddings."""

import pytest
import torch
from compathelp import make_tiny_config, randomize_zeros
from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config


class EmbeddingManager(nn.Module):
    """Replaces the embedding of a placeholder; its initial value is that of another word."""

    def __init__(self, embedder, placeholder, initializer):
        super().__init__()
        self.token = self.find_token(embedder, placeholder)
        embeddings = embedder.transformer.text_model.embeddings
        initial = embeddings.token_embedding.weight[self.find_token(embedder, initializer)]
        self.vector = nn.Parameter(initial.detach().clone())

    def find_token(self, embedder, word):
        batch = embedder.tokenizer(
            word, truncation=True, max_length=77, return_length=True,
            return_overflowing_tokens=False, padding="max_length", return_tensors="pt",
        )  # fmt: skip
        tokens = batch["input_ids"]
        assert torch.count_nonzero(tokens - 49407) == 2, f"{word} is more than one token"
        return int(tokens[0, 1])

    def forward(self, tokens, embedded):
        return torch.where((tokens == self.token)[..., None], self.vector, embedded)


class PersonalizedDiffusion(LatentDiffusion):
    """Trains only the embedding."""

    def __init__(self, personalization_config, *args, **kwargs):
        super().__init__(*args, **kwargs)
        params = personalization_config.params
        self.embedding_manager = EmbeddingManager(self.cond_stage_model, **params)
        for parameter in (*self.model.parameters(), *self.cond_stage_model.parameters()):
            parameter.requires_grad = False

    def get_learned_conditioning(self, c):
        return self.cond_stage_model.encode(c, embedding_manager=self.embedding_manager)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.embedding_manager.parameters(), lr=self.learning_rate)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_training_step_changes_only_the_embedding(use_checkpoint):
    config = make_tiny_config()
    config.target = f"{__name__}.PersonalizedDiffusion"
    config.params.personalization_config = {
        "params": {"placeholder": "*", "initializer": "sculpture"}
    }
    config.params.cond_stage_trainable = True  # the condition is encoded with gradients
    config.params.unet_config.params.use_checkpoint = use_checkpoint
    torch.manual_seed(0)
    model = randomize_zeros(instantiate_from_config(config))
    model.learning_rate = 0.01
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initial_context = model.get_learned_conditioning(["a photo of a sculpture"])
    assert torch.equal(model.get_learned_conditioning(["a photo of a *"]), initial_context)
    optimizer = model.configure_optimizers()
    batch = {"jpg": torch.rand(2, 16, 16, 3) * 2 - 1, "txt": ["a photo of a *", "a * at night"]}
    model.train()
    loss, log = model.shared_step(batch)
    loss.backward()
    optimizer.step()
    assert "train/loss_simple" in log
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == {"embedding_manager.vector"}
    assert not torch.equal(model.get_learned_conditioning(["a photo of a *"]), initial_context)
