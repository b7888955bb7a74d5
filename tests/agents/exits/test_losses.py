"""The losses that train an exit, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spec_envs.agents.exits.losses import distillation, expected_acceptance, masked_cross_entropy, reinforce
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.exits.replay import UNDRAFTED, Segment
from spec_envs.decoding.exits.adapter import KINDS
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.sampling import probabilities
from spec_envs.decoding.weights.checkpoints import load_target
from tests.support.exits import collect_segments, make_exit_agent


def gradient(agent: OnlineAgent) -> Tensor:
    return torch.cat([w.grad.flatten() if w.grad is not None else torch.zeros(w.numel()) for w in weights(agent)])


def weights(agent: OnlineAgent) -> list[torch.nn.Parameter]:
    for weight in (found := agent.passes.weights()):
        weight.requires_grad_(True)
    return found


def without_step(agent: OnlineAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the optimizer's step, so that gradients accumulate and weights stay."""
    monkeypatch.setattr(agent, "_stepped", lambda optimizer: None)
    for optimizer in agent.optimizer.values():
        monkeypatch.setattr(optimizer, "zero_grad", lambda: None)


@pytest.mark.parametrize("kind", KINDS)
def test_reinforce_estimates_gradient_of_acceptance(kind: str, tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average over draws is the exact gradient; without the rejected draws it is not, and without training any
    of ``lora_S`` the estimate would be too small."""
    env, agent = make_exit_agent(tiny, "reinforce", kind)
    with torch.no_grad():  # away from the initial values, of which half are 0
        torch.manual_seed(0)
        adapter = env.unwrapped.decoder.drafter.adapter
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    [segment, *_] = collect_segments(env, agent, 2)
    without_step(agent, monkeypatch)
    rows = 10
    segment = Segment(segment.ids, *(getattr(segment, n)[:rows] for n in list(Segment.__dataclass_fields__)[1:]))
    wanted = agent.adapter.target.head(segment.finals).argmax(-1)

    for weight in weights(agent):
        weight.grad = None
    with torch.no_grad():
        log_probabilities = agent.adapter.logits(agent.passes.rows([segment])).log_softmax(-1)
    exact_loss = -expected_acceptance(
        agent.adapter.logits(agent.passes.rows([segment])), agent.adapter.target.head(segment.finals)
    ).mean()
    exact_loss.backward()
    exact = gradient(agent)
    assert exact.norm() > 1e-4

    def estimate(draws: int, baseline: float, kept_only: bool) -> Tensor:
        """Return the gradient of the agent's own update, averaged over draws of its own policy."""
        for weight in weights(agent):
            weight.grad = None
        generator = torch.Generator().manual_seed(1)
        tokens = torch.multinomial(log_probabilities.exp(), draws, replacement=True, generator=generator)
        for i in range(draws):
            agent.baseline, drafted = baseline, tokens[:, i]
            rewards = (drafted == wanted).float()
            if kept_only:
                drafted = torch.where(rewards > 0, drafted, UNDRAFTED)
            behaviour = log_probabilities.gather(1, tokens[:, i : i + 1])[:, 0]
            fields = {n: getattr(segment, n) for n in Segment.__dataclass_fields__}
            agent.fast_update([Segment(**{**fields, "drafted": drafted, "rewards": rewards, "behaviour": behaviour})])
        return gradient(agent) / draws

    draws = 3000 if kind == "head" else 600
    for baseline in (0.0, 0.6):
        found = estimate(draws, baseline, kept_only=False)
        assert (found - exact).norm() < 0.25 * exact.norm(), (baseline, (found - exact).norm() / exact.norm())
    assert (estimate(draws, 0.6, kept_only=True) - exact).norm() > 0.4 * exact.norm()


def test_importance_weights_correct_for_earlier_policy() -> None:
    """With importance weights the average over another policy's draws is still the exact gradient."""
    torch.manual_seed(0)
    logits, old = torch.randn(1, 6, requires_grad=True), torch.randn(1, 6).log_softmax(-1)
    reward = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    tokens = torch.arange(6)
    losses = reinforce(logits.expand(6, 6), tokens, reward, 0.2, old[0])
    (losses * old[0].exp()).sum().backward()  # the expectation over the old policy, by enumeration
    expected = torch.autograd.grad(-(logits.softmax(-1)[0] * reward).sum(), logits)[0]
    torch.testing.assert_close(logits.grad, expected)


def test_losses_match_their_definitions() -> None:
    torch.manual_seed(0)
    logits, verifier = torch.randn(5, 7), torch.randn(5, 7)
    p, q = verifier.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(expected_acceptance(logits, verifier), q[torch.arange(5), verifier.argmax(-1)])
    torch.testing.assert_close(expected_acceptance(logits, verifier, 1.0), torch.minimum(p, q).sum(-1))
    # temperature and top-p apply to both distributions, as in decoding
    for temperature, top_p in ((0.5, 1.0), (1.0, 0.6), (0.7, 0.8)):
        drawn = [[probabilities(row, temperature, top_p) for row in rows] for rows in (logits, verifier)]
        overlap = torch.from_numpy(np.minimum(*map(np.array, drawn)).sum(-1)).float()
        torch.testing.assert_close(expected_acceptance(logits, verifier, temperature, top_p), overlap)
        torch.testing.assert_close(expected_acceptance(verifier, verifier, temperature, top_p), torch.ones(5))
    torch.testing.assert_close(distillation(logits, verifier), (p * (p.log() - q.log())).sum(-1))
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    tokens = torch.tensor([3, UNDRAFTED, 2, 1, UNDRAFTED])
    expected = torch.stack([-q[0, 3].log(), torch.tensor(0.0), -q[2, 2].log(), torch.tensor(0.0), torch.tensor(0.0)])
    torch.testing.assert_close(masked_cross_entropy(logits, tokens, mask), expected)
    reverse = distillation(logits.requires_grad_(), verifier.requires_grad_()).sum()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(reverse, [logits, verifier]))


def test_gradients_reach_adapter_in_targets_dtype(tiny: dict) -> None:
    """Gradients flow through a float16 target, as on CUDA; a decoder with other exit settings is refused."""
    agent = make_exit_agent(tiny, "reinforce", "layers", texts=1)[1]
    shallower = load_decoder(tiny["target"], "exit:2", "cpu", "float32", width=1, adapter="layers", rank=4)
    with pytest.raises(ValueError, match=r"the decoder has exit_layer, adapter and rank \(2, 'layers', 4\)"):
        agent.bind(shallower)
    agent.bind(load_decoder(tiny["target"], "exit:3", "cpu", "float32", width=1, adapter="layers", rank=4))
    for part in (agent.adapter.lora_S, agent.adapter.lora_D):
        torch.nn.init.normal_(part.low_ranks[f"{part.range[0]}-q_proj"].lora_B)
    agent.passes.model = load_target(tiny["target"], torch.device("cpu"), "float16")
    agent.passes.text(torch.arange(2, 12)).float().sum().backward()
    agent.passes.adapted(torch.arange(2, 12)).float().sum().backward()
    assert agent.adapter.lora_S.low_ranks["0-q_proj"].lora_A.grad.abs().sum() > 0
    assert agent.adapter.lora_D.low_ranks["3-q_proj"].lora_A.grad.abs().sum() > 0
