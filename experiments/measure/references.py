"""Arms of other software on the same weights: transformers' generate, plain and assisted, and llama.cpp's server.

Further engines, which are optional, are in ``comparisons.engines``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.names import LOOKUP, drafter_folder
from spec_envs.decoding.llama_cpp.server import LlamaServer, chain_arguments, find_binary, gguf_of
from spec_envs.decoding.model.precision import FLOATS
from spec_envs.decoding.weights.checkpoints import eos_ids, model_folder
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.measure.arms import Arm, Encoded, Sample

LOG = logging.getLogger(__name__)

LOOKED_UP = 10  # tokens that prompt lookup drafts, the usual number in transformers
NGRAM = 3  # tokens that llama.cpp's lookup matches; its default of 12 hardly ever matches in short answers


class FirstToken(StoppingCriteria):
    """Notes when the first tokens were emitted (by an assisted run, all that its first step accepted); never stops.

    Attributes:
        at: time of the first tokens.
        calls: steps of the run.
        length: tokens of prompt and first tokens.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.at, self.calls, self.length = synchronize, 0.0, 0, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if not self.at:
            self.synchronize()
            self.at, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def transformers_arms(target: str, decoder: Decoder) -> dict[str, Arm]:
    """Return an arm of transformers' ``generate`` on the same weights and device, in the same dtype (bfloat16 for
    int8 and q4)."""
    return {"transformers generate": transformers_arm(language_model(target, decoder), decoder)}


def assisted_arms(target: str, decoder: Decoder, draft: tuple[str, int] | None) -> dict[str, Arm]:
    """Return arms of ``generate``, plain and assisted. An assisted arm that transformers cannot run is left out, and
    the reason is logged.

    Args:
        draft: name of the draft model, and number of tokens that it always drafts; None assists by prompt lookup.
    """
    model = language_model(target, decoder)
    arms = {"transformers generate": transformers_arm(model, decoder)}
    if draft is None:
        return arms | {"transformers assisted": transformers_arm(model, decoder, prompt_lookup_num_tokens=LOOKED_UP)}
    name, k = draft
    if name == LOOKUP:
        return arms | {"transformers assisted": transformers_arm(model, decoder, prompt_lookup_num_tokens=k)}
    if not (drafter_folder(name) / "tokenizer_config.json").is_file():
        LOG.warning("transformers assisted is left out: the draft model is not a complete model")
        return arms
    assistant = language_model(name, decoder)
    if assistant.config.vocab_size != model.config.vocab_size:
        LOG.warning("transformers assisted is left out: it needs models of the same vocabulary size")
        return arms
    fixed = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    assistant.generation_config.update(num_assistant_tokens=k, **fixed)
    return arms | {"transformers assisted": transformers_arm(model, decoder, assistant_model=assistant)}


def language_model(name: str, decoder: Decoder) -> Any:
    """Return a model of transformers on the decoder's device.

    It has none of the penalties and filters of its own generation settings, but its own ids that end texts.
    """
    target = decoder.local.target
    model = transformers_model(model_folder(name), FLOATS.get(target.dtype, torch.bfloat16)).to(target.device)
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids(name)))
    return model


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """Return transformers' model of a folder; its weights may lie in a GGUF file."""
    transformers_logging.disable_progress_bar()  # shown while weights are read
    config, weights = load_config(folder), load_weights(folder)
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return made.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).eval()


def transformers_arm(model: Any, decoder: Decoder, **further: Any) -> Arm:
    """Return an arm of ``generate``, which gets the arguments ``further``."""
    verifier = decoder.verifier
    synchronize = WallClock(verifier.device).synchronize
    # Padding is never used, because there is one text at a time.
    common = partial(GenerationConfig, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
    if verifier.temperature:
        config = partial(common, do_sample=True, temperature=verifier.temperature, top_p=verifier.top_p, top_k=0)
    else:
        config = partial(common, do_sample=False)

    def run(prompt: Encoded, max_new_tokens: int, seed: int) -> Sample:
        torch.manual_seed(seed)
        first = FirstToken(synchronize)
        ids = torch.tensor([prompt.ids], device=model.device)
        begin = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config(max_new_tokens=max_new_tokens),
            stopping_criteria=StoppingCriteriaList([first]),
            **further,
        )
        tokens = out[0, ids.shape[1] :].tolist()
        end = time.perf_counter()
        made = out.shape[1] - first.length
        return Sample(prompt, made, end - first.at, first.at - begin, tokens, cycles=first.calls - 1)

    return run


def llamacpp_arms(target: str, threads: int, draft: tuple[str, int] | None) -> dict[str, Arm]:
    """Return arms of llama.cpp's server on the models' own GGUF files, plain and drafting. An arm is left out if a
    model has another format or the server does not start, and the reason is logged.

    Args:
        draft: name of the draft model, and number of tokens that it drafts; None drafts by prompt lookup.
    """
    lookup = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", str(NGRAM)]
    lookup += ["--spec-ngram-simple-size-m", str(LOOKED_UP)]
    arms = {}
    for name in ("llama.cpp", "llama.cpp drafting"):
        try:
            model, arguments = gguf_of(target)
            if name == "llama.cpp drafting":
                by_model = draft is not None and draft[0] != LOOKUP
                arguments = [*arguments, *(chain(*draft) if draft and by_model else lookup)]
            arms[name] = llamacpp_arm(LlamaServer(model, arguments, threads).complete)
        except ValueError as error:
            LOG.warning(f"{name} is left out: {error}")
    return arms


def chain(drafter: str, k: int) -> list[str]:
    """Return the arguments with which llama-server drafts ``k`` tokens by a model."""
    return chain_arguments(find_binary(), gguf_of(drafter)[0], k)


def llamacpp_arm(complete: Callable[[list[int], int], dict[str, Any]]) -> Arm:
    """Return an arm of a server of llama.cpp, which ``complete`` asks to continue token ids. Its seconds are those that
    the server reports for generation after the prompt."""

    def run(prompt: Encoded, max_new_tokens: int, seed: int) -> Sample:
        answer = complete(prompt.ids, max_new_tokens)
        timings, tokens = answer["timings"], answer["tokens"]
        seconds, prefill = timings["predicted_ms"] / 1000, timings["prompt_ms"] / 1000
        accepted = timings.get("draft_n_accepted", 0)
        made = timings["predicted_n"] - 1
        return Sample(prompt, made, seconds, prefill, tokens, cycles=made - accepted, accepted=accepted)

    return run
