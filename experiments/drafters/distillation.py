"""A small draft model and the objective of its training: a few of the target's layers learn to predict what all layers
predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PretrainedConfig

from spec_envs.decoding.model.shape import part
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.config import ON_TARGET
from spec_envs.experiments.drafters.batches import Batch
from spec_envs.experiments.drafters.distilled import DraftVocabulary, Scores
from spec_envs.files import write_bytes, write_json


def kept_layers(layers: int, count: int) -> list[int]:
    """Return the indices of the ``count`` layers of a target from which its draft model starts: the first ones, which
    read the text, and the last.

    Raises:
        ValueError: the target does not have more layers than that.
    """
    if not 1 <= count < layers:
        raise ValueError(f"the draft model's layers are {count}; expected 1 to {layers - 1}, fewer than the target's")
    return [*range(count - 1), layers - 1]


class Student(nn.Module):
    """A draft model: a few layers between the target's embedding and its output rows, which are not trained.

    Args:
        config: the target's configuration with other numbers of layers and of units.
        target: the model whose embedding is read.
        draft_ids: ids of the shortlist, ascending.
    """

    def __init__(self, config: PretrainedConfig, target: Transformer, draft_ids: Tensor):
        super().__init__()
        self.config, self.draft_ids = config, draft_ids
        self.embedding = target.embedding_weight()
        self.model: Any = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
        del self.model.embed_tokens

    @classmethod
    def from_target(
        cls, config: PretrainedConfig, weights: dict[str, Tensor], target: Transformer, count: int, draft_ids: Tensor
    ) -> Student:
        """Return a student that starts as ``count`` of the target's layers.

        Args:
            config: the target's, or as ``narrowed`` leaves it; it is changed.
            weights: the target's state dict, likewise.
        """
        kept = kept_layers(config.num_hidden_layers, count)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer] for layer in kept]
        state = {"model.norm.weight": weights["model.norm.weight"]}
        for i, layer in enumerate(kept):
            own = part(weights, f"model.layers.{layer}.")
            state |= {f"model.layers.{i}.{key}": tensor for key, tensor in own.items()}
        return cls.from_draft_model(config, state, target, draft_ids)

    @classmethod
    def from_draft_model(
        cls, config: PretrainedConfig, weights: dict[str, Tensor], target: Transformer, draft_ids: Tensor
    ) -> Student:
        """Return a student that starts as a draft model.

        Args:
            config, weights: of a draft model that was saved, whose shortlist is not read.
        """
        student = cls(config, target, draft_ids)
        student.model.load_state_dict({k: v.float() for k, v in part(weights, "model.").items()})
        return student

    def forward(self, batch: Batch) -> Tensor:
        """Return the normed hidden states of the batch, ``[n, hidden]``. The padding of shorter texts needs no mask,
        because it is on the right and attention is causal."""
        lengths = list(batch.lengths)
        embedded = F.embedding(pad_sequence(batch.ids.split(lengths), batch_first=True), self.embedding).float()
        hidden: Tensor = self.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden[batch.text, batch.position]

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors with Hugging Face's names. The embedding is left out, so the model
        has its own type; the tensor ``shortlist`` holds the ids of the shortlist."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"model.{name}": tensor.to(dtype).contiguous() for name, tensor in self.model.state_dict().items()}
        state["shortlist"] = self.draft_ids.to(torch.int32)
        write_bytes(folder / "model.safetensors", save(state))
        self.config.dtype = dtype
        settings = {
            k: v for k, v in self.config.to_diff_dict().items() if not k.startswith("_") and k != "architectures"
        }
        write_json(folder / "config.json", settings | {"model_type": ON_TARGET + self.config.model_type})


class Distillation:
    """Cross-entropy of a draft model to the target's distribution, over the answers and a share of the prompts.

    Args:
        model: what is trained.
        target: the model for which it drafts.
        dtype: in which matrices are multiplied.
    """

    reads_features = False

    def __init__(self, model: Student, target: Transformer, dtype: torch.dtype):
        self.model, self.trained, self.device = model, model.model, target.device
        self.vocabulary = DraftVocabulary(target.output_weight(), model.draft_ids, dtype)

    def __call__(
        self, batch: Batch, steps: int, share: float, generator: torch.Generator, prompts: float = 0.0
    ) -> Scores:
        """Return loss and acceptance; see ``Objective``. ``share`` is not used.

        Under greedy decoding a chain reads its own tokens, which are those of the text as long as they are right. So
        one pass over the text shows how far each chain would be accepted.
        """
        vocabulary = self.vocabulary.of(batch)
        at = batch.trained(-1, prompts, generator)
        with self.vocabulary.autocast():
            loss, found = self.vocabulary.compared(batch, vocabulary, self.model(batch)[at], at)
        right = torch.zeros(len(batch.ids) + steps, dtype=torch.bool, device=self.device)
        right[at] = found
        alive, survived, counted = torch.ones_like(batch.inside), [], []
        for step in range(steps):
            alive, drafting = alive & right[step : step + len(alive)], batch.drafting(step - 1)
            survived.append((alive & drafting).sum())
            counted.append(drafting.sum())
        return Scores(loss / max(1, len(at)), torch.stack(survived).float(), torch.stack(counted).float())
