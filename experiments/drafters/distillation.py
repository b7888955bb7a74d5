"""A small draft model and the objective of its training: a few of the target's layers learn to predict what all layers
predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from spec_envs.decoding.model.shape import part
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import model_folder
from spec_envs.decoding.weights.config import ON_TARGET, load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.drafters.batches import Batch, drafted_rows, first_occurrence
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
        config: the target's configuration with another number of layers.
        target: the model whose embedding is read.
        draft_ids: ids of the shortlist, ascending.
    """

    def __init__(self, config: PretrainedConfig, target: Transformer, draft_ids: Tensor):
        super().__init__()
        self.config, self.draft_ids = config, draft_ids
        self.embedding = target.embedding_weight()
        self.model: Any = AutoModel.from_config(config, dtype=torch.float32)
        del self.model.embed_tokens

    @classmethod
    def from_target(cls, name: str, target: Transformer, count: int, draft_ids: Tensor) -> Student:
        """Return a student that starts as ``count`` of the target's layers."""
        folder = model_folder(name)
        config, weights = load_config(folder), load_weights(folder)
        kept = kept_layers(config.num_hidden_layers, count)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer] for layer in kept]
        student = cls(config, target, draft_ids)
        state = {"norm.weight": weights["model.norm.weight"].float()}
        for i, layer in enumerate(kept):
            own = part(weights, f"model.layers.{layer}.")
            state |= {f"layers.{i}.{key}": tensor.float() for key, tensor in own.items()}
        student.model.load_state_dict(state)
        return student

    def forward(self, batch: Batch) -> Tensor:
        """Return normed hidden states ``[B, T, hidden]``. The padding needs no mask, because it is on the right and
        attention is causal."""
        embedded = F.embedding(batch.ids, self.embedding).float()
        hidden: Tensor = self.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden

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
    """Cross-entropy to the target's distribution over the shortlist and the tokens of the batch.

    The output rows are the target's and stay fixed. So in use the tokens of the text can join the shortlist.

    Args:
        output_head: the target's output rows ``[vocab, hidden]``.
        dtype: dtype of autocast.
    """

    def __init__(self, model: Student, output_head: Tensor, dtype: torch.dtype):
        self.model, self.trained, self.dtype = model, model.model, dtype
        self.shortlist = torch.zeros(len(output_head), dtype=torch.bool, device=output_head.device)
        self.shortlist[model.draft_ids] = True
        self.output_head = output_head.to(dtype)

    def __call__(
        self, batch: Batch, steps: int, share: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss (a scalar) and, for each chain length up to ``steps``, the number of positions of the answers
        from which that many tokens in a row are right, and the number of all positions: ``[steps]`` each.

        Under greedy decoding a chain reads its own tokens, which are those of the text as long as they are right. So
        one pass over the text shows how far each chain would be accepted. ``share`` and ``generator`` are not used.
        """
        vocabulary = self.shortlist.clone()
        vocabulary[batch.ids] = True
        ids = vocabulary.nonzero()[:, 0]
        rows = self.output_head[ids]
        picked = drafted_rows(batch, -1, within_answer=False).nonzero(as_tuple=True)
        with torch.autocast(batch.ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            wanted = F.linear(batch.final[picked].to(self.dtype), rows).float().softmax(-1)
            logits = F.linear(self.model(batch)[picked], rows).float()
        loss = F.cross_entropy(logits, wanted)
        following = batch.ids[picked[0], picked[1] + 1]
        right = torch.zeros(batch.ids.shape, dtype=torch.bool, device=batch.ids.device)
        right[picked] = (ids[logits.argmax(-1)] == following) & (
            self.shortlist[following] | (first_occurrence(batch.ids)[picked[0], picked[1] + 1] <= picked[1])
        )
        survived, counted, alive = [], [], right
        for step in range(steps):
            inside = drafted_rows(batch, step - 1)
            if step:
                alive = alive & F.pad(right[:, step:], (0, step))
            survived.append((alive & inside).sum())
            counted.append(inside.sum())
        return loss, torch.stack(survived).float(), torch.stack(counted).float()
