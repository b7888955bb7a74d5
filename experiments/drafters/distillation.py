"""The objective that a small draft model is trained on: a few of the target's layers learn to predict what all of them
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
    """Return the ``count`` layers of a target that its draft model starts from: the first ones, which read the text,
    and the last.

    Raises:
        ValueError: the target has fewer.
    """
    if not 1 <= count < layers:
        raise ValueError(f"the draft model's layers are {count}; expected 1 to {layers - 1}, fewer than the target's")
    return [*range(count - 1), layers - 1]


class Student(nn.Module):
    """A model of a few layers between the target's embedding and its output rows, both of which stay as they are.

    Args:
        config: the target's, with the number of layers changed.
        target: whose embedding it reads.
        draft_ids: ascending target ids of the shortlist.
    """

    def __init__(self, config: PretrainedConfig, target: Transformer, draft_ids: Tensor):
        super().__init__()
        self.config, self.draft_ids = config, draft_ids
        self.embedding = target.embedding
        self.model: Any = AutoModel.from_config(config, dtype=torch.float32)
        del self.model.embed_tokens

    @classmethod
    def from_target(cls, name: str, target: Transformer, count: int, draft_ids: Tensor) -> Student:
        """Return a student of ``count`` layers that are the target's own."""
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
        """Return normed hidden states ``[B, T, hidden]`` of texts padded on the right, which causal attention need not
        mask."""
        embedded = F.embedding(batch.ids, self.embedding).float()
        hidden: Tensor = self.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors with Hugging Face's names, without the embedding, and so with a type
        of its own; ``shortlist`` holds the ids that it drafts."""
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
    """Cross-entropy to the target's distribution over the shortlist and the tokens of the batch (the output rows are
    the target's and stay fixed, so that any token of a text can join in use).

    Args:
        output_head: the target's output rows ``[vocab, hidden]``.
        dtype: of autocast.
    """

    def __init__(self, model: Student, output_head: Tensor, dtype: torch.dtype):
        self.model, self.trained, self.dtype = model, model.model, dtype
        self.shortlist = torch.zeros(len(output_head), dtype=torch.bool, device=output_head.device)
        self.shortlist[model.draft_ids] = True
        self.output_head = output_head.to(dtype)

    def __call__(
        self, batch: Batch, steps: int, share: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss (a scalar), and per length up to ``steps`` the number of the answers' positions from which
        that many tokens in a row are right, and of all positions.

        Under greedy decoding a chain reads its own tokens, which are the text's as long as they are right: one pass
        over the text shows how far each would be accepted. ``share`` and ``generator`` have no use here.
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
