"""Arms of further engines on the same GGUF file, as far as their packages are installed (the extra ``engines``).

``xllamacpp`` is llama.cpp in a newer build, and ``openvino`` is OpenVINO GenAI.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spec_envs.decoding.llama_cpp.server import DIRECT, gguf_of
from spec_envs.experiments.measure.arms import Arm, Encoded, Sample
from spec_envs.experiments.measure.references import llamacpp_arm

LOG = logging.getLogger(__name__)
CONTEXT = 4096  # tokens of prompt and answer


def engine_arms(target: str, threads: int) -> dict[str, Arm]:
    """Return an arm of plain decoding for each engine that is installed. An engine that cannot read the model's file is
    left out, and the reason is logged."""
    arms = {}
    for name, (package, make) in ENGINES.items():
        if importlib.util.find_spec(package) is None:
            continue
        try:
            arms[name] = make(gguf_of(target)[0], threads)
        except (ValueError, RuntimeError) as error:
            LOG.warning(f"{name} is left out: {error}")
    return arms


def xllamacpp_arm(model: Path, threads: int) -> Arm:
    """Return an arm of llama.cpp's server as the package xllamacpp has it, which runs in this process."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(model), CONTEXT, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def complete(prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        settings = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
        body = json.dumps({"prompt": prompt, "n_predict": max_new_tokens, **settings}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        with DIRECT.open(request) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    return llamacpp_arm(complete)


def openvino_arm(model: Path, threads: int) -> Arm:
    """Return an arm of OpenVINO GenAI, which reads GGUF files itself."""
    openvino: Any = importlib.import_module("openvino")
    genai: Any = importlib.import_module("openvino_genai")
    pipeline = genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    def run(prompt: Encoded, max_new_tokens: int, seed: int) -> Sample:
        ids = np.array([prompt.ids], np.int64)
        config = genai.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
        result = pipeline.generate(
            genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))), config
        )
        tokens, times = list(result.tokens[0]), result.perf_metrics
        prefill = times.get_ttft().mean / 1000
        made = len(tokens) - 1
        return Sample(prompt, made, times.get_generate_duration().mean / 1000 - prefill, prefill, tokens, cycles=made)

    return run


ENGINES: dict[
    str, tuple[str, Callable[[Path, int], Arm]]
] = {  # by name of the arm: the package, and what makes the arm
    "xllamacpp": ("xllamacpp", xllamacpp_arm),
    "openvino": ("openvino_genai", openvino_arm),
}
