"""The default model under speculation emits its own text, greedily and in distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from spec_envs import ENVIRONMENTS, generate
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.controls import CONTROLS, Policy, Predictor, make_control
from spec_envs.controls.dvi import DVIControl, exit_of
from spec_envs.controls.observation.entries import TASKS
from spec_envs.decoding import accept
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_tokenizer, model_folder
from spec_envs.experiments.measure.arms import Encoded, decoded
from spec_envs.experiments.measure.references import transformers_model
from spec_envs.experiments.measure.results import Divergence
from spec_envs.experiments.measure.statistics import divergence
from spec_envs.prompts.sets import encode, encode_prompt, load_prompts
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.tiny import REAL
from tests.support.power import draws_for_power

pytestmark = pytest.mark.model
TOKENS = 40


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    """Return the shortest test prompt of every task that observations tell apart."""
    tokenizer = load_tokenizer(REAL)
    texts = {task: min((p.text for p in load_prompts(task, "test")), key=len) for task in TASKS}
    return {task: encode(tokenizer, text) for task, text in texts.items()}


@pytest.fixture(scope="module")
def plain_texts(prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    decoder = load_decoder(REAL, None, "cpu", "float32")
    return {task: generate(decoder, None, None, ids, TOKENS).run().tokens for task, ids in prompts.items()}


def test_plain_decoding_equals_transformers(prompts: dict, plain_texts: dict) -> None:
    model = transformers_model(model_folder(REAL), torch.float32)
    for task, ids in prompts.items():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
        )
        assert out[0, len(ids) :].tolist() == plain_texts[task], task


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_greedy_text_is_plain_text_under_random_actions(env_id: str, prompts: dict, plain_texts: dict) -> None:
    keywords = {"budgets": [4, 12, 24, 48], "depth": "random", "budget": 32, "max_depth": 8}
    models = {"target": REAL, "device": "cpu", "dtype": "float32"}
    exits = {**models, "exit_layer": 24, "block": 3}
    control = make_control(env_id, exits if env_id == "SpecDVI-v0" else keywords)
    decoder = control.open(**models, temperature=0.0)
    agent: Predictor = RandomAgent(control, seed=1)
    if isinstance(control, DVIControl):  # random tokens would hardly ever be accepted
        agent = NoisyExitAgent(decoder, share=0.8)
    accepted = 0
    for task, ids in prompts.items():
        done = generate(decoder, control, agent, ids, TOKENS, seed=1).run()
        assert done.tokens == plain_texts[task], task
        accepted += sum(c.accepted for c in done.cycles)
    assert accepted > 40  # drafts were accepted


class NoisyExitAgent:
    """Draft the exit's own predictions with probability ``share``, else random tokens."""

    decision_seconds = 0.0

    def __init__(self, decoder: Decoder, share: float):
        self.adapter, self.share, self.rng = exit_of(decoder), share, np.random.default_rng(0)

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[int, None]:
        if self.rng.random() > self.share:
            return int(self.rng.integers(40_000)), None
        return int(self.adapter.logits(torch.from_numpy(observation)[None]).argmax()), None


@pytest.mark.parametrize("drafts", ["tree", "chain"])
def test_sampling_keeps_distribution_of_real_model(drafts: str, prompts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A χ² test compares the first emitted token with transformers' distribution, with enough draws to detect a bias of
    0.03.

    The draws go through the verifier's own acceptance, on a drafted tree or on a token sampled from a draft model (the
    target at a higher temperature), after a real text; only the forward and the distribution of each row are computed
    once for all draws. A rule that emits the most probable token slightly too often is detected with the same number of
    draws.
    """
    temperature, top_p = 0.7, 0.95
    decoder = load_decoder(REAL, "smollm2-135m-eagle3", "cpu", "float32", temperature=temperature, top_p=top_p)
    reference = transformers_model(model_folder(REAL), torch.float32)
    verifier, rng = decoder.verifier, np.random.default_rng(0)
    if drafts == "chain":
        drafter = DraftModelDrafter(verifier.target, verifier.target, temperature=1.3)
        decoder = Decoder(verifier, drafter, decoder.clock, decoder.eos)
    decoder.start(prompts["mt_bench"], 40, rng)
    with torch.inference_mode():
        while True:  # until the model is uncertain
            if drafts == "chain":
                decoder.begin()
            else:
                decoder.expand()
            size = min(12, decoder.tree.size)
            tokens, parents, _ = decoder.tree.subtree(decoder.tree.select(size))
            text = torch.tensor([decoder.prompt + decoder.tokens])
            logits = TemperatureLogitsWarper(temperature)(text, reference(text).logits[:, -1].double())
            p = TopPLogitsWarper(top_p)(text, logits)[0].softmax(-1).numpy()
            if np.sort(p)[-2] > 0.15:
                break
            decoder.verify(size)
        proposals = list(decoder.tree.proposals)
        verifier.text.read(verifier.last, tokens, parents, False)
        logits = verifier.target.head(verifier.text.hidden())
    distribution, known = verifier._probabilities, {}

    def once(row: torch.Tensor) -> np.ndarray:
        if row.data_ptr() not in known:
            known[row.data_ptr()] = distribution(row)
        return known[row.data_ptr()]

    monkeypatch.setattr(verifier, "_probabilities", once)
    order = np.argsort(-p)[:8]
    order = order[p[order] > 0.005]
    rest = 1 - p[order].sum()
    expected = np.append(p[order], rest) if rest > 0.005 else p[order] / p[order].sum()
    draws = draws_for_power(expected, bias=0.03, power=0.999)

    def statistic() -> float:
        where = {int(token): i for i, token in enumerate(order)}
        counts = np.zeros(len(expected))
        for _ in range(draws):
            if proposals:
                tokens[0] = proposals[0].draw(rng.random())
            verdict = verifier._sample(tokens, parents, logits, proposals)
            first = int(tokens[verdict.path[0]]) if verdict.path else verdict.token
            counts[min(where.get(first, len(order)), len(expected) - 1)] += 1
        return float(((counts - draws * expected) ** 2 / (draws * expected)).sum())

    critical = chi2.isf(0.001, len(expected) - 1)
    assert statistic() < critical

    rule = "chained" if proposals else "sampled"
    unbiased, best = getattr(accept, rule), int(order[0])
    share = 0.03 / (1 - p[best])  # the share of draws of another token that is changed, for a total variation of 0.03

    def biased(tokens: np.ndarray, *arguments: Any) -> tuple[list[int], int]:
        path, token = unbiased(tokens, *arguments)
        first = tokens[path[0]] if path else token
        return ([], best) if first != best and rng.random() < share else (path, token)

    monkeypatch.setattr(accept, rule, biased)
    assert statistic() > critical


@pytest.mark.skipif(WITHOUT_KERNELS, reason="the kernels need a C++ compiler")
@pytest.mark.parametrize("dtype", ["int8", "q4"])
def test_text_of_the_kernels_is_plain_text_under_random_actions(pytestconfig: pytest.Config, dtype: str) -> None:
    """Texts are equal token for token, and every token is the argmax of one forward over the whole text."""
    count, tokens = pytestconfig.getoption("--prompts"), 64
    decoder = load_decoder(REAL, "auto", "cpu", dtype)
    tokenizer, texts = load_tokenizer(REAL), load_prompts("all", "all")
    chosen = [Encoded(p.task, encode_prompt(tokenizer, p)) for p in texts[:: max(1, len(texts) // count)]][:count]
    plain = decoded(decoder.plain(), None)
    arms = []
    keywords: list[tuple[str, str, dict]] = [
        ("depth", "auto", {"budget": 32}),
        ("budget", "auto", {"depth": "random"}),
        ("tree", "auto", {"budgets": [4, 24]}),
        ("tree", "smollm2-135m-eagle3", {"budgets": [2, 12]}),
        ("budget", "suffix+smollm2-135m-eagle3", {"depth": "random"}),
        ("depth", "suffix", {"budget": 8}),
        ("k", "auto", {}),
        ("k", "auto", {"decision": "token"}),
        ("k", "lookup", {}),
        ("k", "suffix@stream", {}),
        ("k", "suffix+smollm2-135m-draft", {"decision": "token"}),
        ("k", "smollm2-135m-draft", {}),
        ("k", "exit:24", {}),
        ("k", "lookup+exit:2", {"decision": "token"}),
        ("topk", "lookup+smollm2-135m-draft", {"actions": "joint", "k": 8, "ks": [0, 50]}),
        ("dvi", "exit:24", {"exit_layer": 24, "block": 2, "dtype": dtype}),
        ("drafter", "auto", {}),
    ]
    assert {name for name, *_ in keywords} == set(CONTROLS)
    for name, drafter, own in keywords:
        control = make_control(name, own)
        models = {"target": REAL, "device": "cpu", "dtype": dtype, "temperature": 0.0}
        drafting = control.open(drafter=drafter, **models)
        agent: Predictor = NoisyExitAgent(drafting, 0.8) if name == "dvi" else RandomAgent(control, seed=1)
        arms.append(decoded(drafting, Policy(control, agent)))
    accepted, samples = 0, []
    for i, prompt in enumerate(chosen):
        sample = arms[i % len(arms)](prompt, tokens, i)
        assert sample.ids == plain(prompt, tokens, i).ids, prompt
        accepted += sample.accepted
        samples.append(sample)
    assert accepted > 3 * len(samples)
    assert divergence(decoder, samples, samples) == Divergence(per_1000=0.0, largest_gap=0.0, same_text=1.0)


def test_bfloat16_differs_at_near_ties_only(prompts: dict) -> None:
    """Every emitted token is the argmax of a forward over its text, or within a small logit gap of it."""
    control = make_control("depth", {"budget": 32})
    decoder = load_decoder(REAL, "auto", "cpu", "bfloat16")
    arm = decoded(decoder, Policy(control, RandomAgent(control, seed=0)))
    samples = [arm(Encoded(task, ids), TOKENS, 0) for task, ids in prompts.items()]
    found = divergence(decoder, samples, samples)
    # Logits from 16 to 32 are 0.125 apart in bfloat16; processors without bfloat16 instructions round more often.
    assert found.largest_gap <= 8 * 0.125 and found.per_1000 < 60, found
