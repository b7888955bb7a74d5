"""Chat templates from other sources are deterministic and bounded, and every failure is reported in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.runs import resolved
from spec_envs.experiments.traces.plan import Plan
from spec_envs.experiments.traces.record import recorded
from spec_envs.prompts import templates
from spec_envs.prompts.sets import Prompt, encode, encode_all
from spec_envs.prompts.templates import DATE, Refused, rendered
from tests.support.models.tiny import REAL

TURNS = [("system", "the"), ("user", "a of"), ("assistant", "and"), ("user", "in")]
NO_SYSTEM = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }} . {% endfor %}"
)
DATED = "{{ 'on ' * (strftime_now('%d') | int) }}{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_target))


@pytest.mark.model
def test_template_renders_as_in_transformers() -> None:
    real = load_tokenizer(REAL)
    messages = [{"role": role, "content": text} for role, text in TURNS]
    assert rendered(real, TURNS) == real.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = real.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert encode(real, "in", history=TURNS[:-1]) == ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if", r"malformed \(line 1: unexpected"),
        ("{{ 1 | nofilter }}", "malformed .*nofilter"),
        ("{{ raise_exception('no\x1b[2J system\nturn') }}", r"does not take the prompt \(no.\[2J system\)"),
        ("{{ unknown() }}", "'unknown' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0] + 1 }}", "unsupported operand"),
        ("{{ 10.0 ** 1000 }}", "out of range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'x' %}", "no loader"),
        ("{{ range(10 ** 9) | list }}", "too big"),
        ("{{ strftime_now(3) }}", "must be str"),
        ("{{ 'x' * 9000000 }}", "9,000,000 characters"),
    ],
)
def test_template_errors_are_reported_in_one_sentence(
    template: str, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=rf"template in template= .*{message}") as raised:
        encode(tokenizer, "the", template)
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 12 }}",
        "{{ 'x' * 10 ** 11 | int }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    ],
)
def test_time_and_memory_of_templates_are_bounded(
    template: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    with pytest.raises(ValueError, match="takes too much") as raised:
        encode(tokenizer, "the", template)
    assert not isinstance(raised.value, Refused)  # so the rest of a log is not tried
    assert encode(tokenizer, "the")


@pytest.mark.parametrize("template", ["", "{{ '' }}", "{# nothing #}"])
def test_prompt_without_tokens_is_refused(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        encode(tokenizer, "the", template)


@pytest.mark.parametrize("template", [None, "none"])
@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_empty_prompt_is_refused(
    template: str | None, text: str, tokenizer: PreTrainedTokenizerBase, tiny: dict
) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode(tokenizer, text, template)
    env = gym.make("SpecK-v0", **(tiny | {"drafter": "lookup"}))
    with pytest.raises(ValueError, match="the prompt is empty"):
        env.reset(seed=0, options={"prompt": text})
    with pytest.raises(ValueError, match="the prompt is empty"):
        env.reset(seed=0, options={"prompt": Prompt("mine", text)})


def test_prompts_given_to_reset(tiny: dict) -> None:
    env = gym.make("SpecK-v0", **(tiny | {"drafter": "lookup", "template": NO_SYSTEM}))
    with pytest.raises(ValueError, match="the prompt has 3001 tokens"):
        env.reset(seed=0, options={"prompt": "the " * 3000})
    with pytest.raises(ValueError, match="roles must alternate"):
        env.reset(seed=0, options={"prompt": Prompt("mine", "the", (("system", "a"),))})
    with pytest.raises(ValueError, match="the prompt is 3; expected a text"):
        env.reset(seed=0, options={"prompt": Prompt("mine", 3)})  # type: ignore[arg-type]
    env.reset(seed=0, options={"prompt": "the \ud83d"})
    assert env.unwrapped.decoder.prompt == encode(env.unwrapped.prompts.tokenizer, "the \ufffd", NO_SYSTEM)


def test_lone_surrogates_are_replaced_everywhere(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, half = "the \ufffd", "the \ud83d"
    assert encode(tokenizer, half) == encode(tokenizer, whole)
    assert encode(tokenizer, half, "none") == encode(tokenizer, whole, "none")
    assert encode(tokenizer, "a", None, (("system", half),)) == encode(tokenizer, "a", None, (("system", whole),))
    assert encode(tokenizer, "a", "the \ud83d {{ messages }}") == encode(tokenizer, "a", "the \ufffd {{ messages }}")


def test_far_too_long_prompt_is_refused_unencoded(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Refused, match=r"has 10,000,000 characters; expected at most"):
        encode(tokenizer, "the a of a" * 1_000_000)


def test_begin_of_text_is_not_doubled(tiny_target: Path) -> None:
    twice = AutoTokenizer.from_pretrained(tiny_target)
    twice.bos_token = "is"
    is_, the = twice.convert_tokens_to_ids(["is", "the"])
    assert encode(twice, "is is the", "none") == [is_, the] and encode(twice, "the is is", "none")[-2:] == [is_, is_]


def test_prompts_that_the_template_refuses_are_left_out(
    tiny: dict, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[("human", "the a")], [("system", "is"), ("human", "to on")], [("human", "in the")]]
    log = tmp_path / "log.jsonl"
    turns = [{"conversations": [{"from": who, "value": message} for who, message in row]} for row in rows]
    log.write_text("\n".join(map(json.dumps, turns)))
    settings: dict[str, Any] = tiny | {"drafter": "lookup", "template": NO_SYSTEM, "prompts": str(log)}
    env = gym.make("SpecK-v0", **settings, split="all")
    message = caplog.text
    caplog.clear()
    assert [prompt.text for prompt in env.unwrapped.prompts] == ["the a", "in the"]
    assert (
        "left out 1 of 3 prompts: " in message
        and "(roles must alternate)" in message
        and message.count("left out") == 1
    )
    assert len(encoded_prompts(settings, "all", 9)) == 2
    assert "left out 1 of 3 prompts: " in caplog.text
    log.write_text(json.dumps(turns[1]))
    for make in (lambda: gym.make("SpecK-v0", **settings, split="all"), lambda: encoded_prompts(settings, "all", 9)):
        with pytest.raises(ValueError, match=r"does not take the prompt \(roles must alternate"):
            make()
    strict = [Prompt("mine", "the"), Prompt("mine", "a", (("system", "x"),))]
    with pytest.raises(ValueError, match="roles must alternate"):
        list(encode_all(tokenizer, strict, NO_SYSTEM))


def test_date_of_templates_is_fixed(tokenizer: PreTrainedTokenizerBase, tiny: dict) -> None:
    on, the = tokenizer.convert_tokens_to_ids(["on", "the"])
    assert DATE.endswith("-01") and encode(tokenizer, "the", DATED) == [on, the]
    assert encode(tokenizer, "the", DATED, date="2024-02-29") == [on] * 29 + [the]
    for bad in ("2024-02-30", "today", "26 Jul 2024", "2024-1-1x"):
        with pytest.raises(ValueError, match=f"date is '{bad}'; expected a day, such as '{DATE}'"):
            encode(tokenizer, "the", date=bad)
    settings = tiny | {"drafter": "lookup", "template": DATED, "date": "2026-03-05"}
    env = gym.make("SpecK-v0", **settings)
    env.reset(seed=0, options={"prompt": "the"})
    assert env.unwrapped.decoder.prompt == [on] * 5 + [the]
    assert encoded_prompts(settings, "test", 1)[0].ids[:6].count(on) == 5


def test_random_numbers_of_templates_are_reproducible(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ range(100000) | random }} {{ lipsum(n=1) }}"
    state = random.getstate()
    first = rendered(tokenizer, TURNS, template)
    assert random.getstate() == state
    random.random()
    assert rendered(tokenizer, TURNS, template) == first


def test_runs_and_traces_record_the_date(tiny: dict, tmp_path: Path, tiny_draft: Path) -> None:
    stanza = load_experiment("SpecK-v0", "ppo")
    config = yaml.safe_load(yaml.safe_dump(resolved(stanza, "SpecK-v0", "ppo", 0).env))
    assert config["date"] == DATE
    stanza = load_experiment("SpecK-v0", "ppo", ["env.date='2026-03-05'"])
    assert resolved(stanza, "SpecK-v0", "ppo", 0).env["date"] == "2026-03-05"
    stanza = load_experiment("SpecK-v0", "ppo", ["env.trace=somewhere"])  # the trace records its own date
    assert "date" not in resolved(stanza, "SpecK-v0", "ppo", 0).env

    env = {name: tiny[name] for name in ("target", "device", "dtype", "max_new_tokens")}
    plan = Plan("SpecK-v0", env | {"drafter": "lookup", "k_max": 3, "date": "2026-03-05"}, (2, 0, 0))
    trace = recorded(plan, tmp_path / "trace")
    assert trace.manifest.date == "2026-03-05"
    folder = str(trace.folder)
    gym.make("SpecK-v0", trace=folder, k_max=3)
    gym.make("SpecK-v0", trace=folder, k_max=3, date="2026-03-05")
    with pytest.raises(ValueError, match="was recorded with date '2026-03-05', not '2026-03-06'"):
        gym.make("SpecK-v0", trace=folder, k_max=3, date="2026-03-06")
    with pytest.raises(ValueError, match="was recorded with date '2026-03-05', not '2026-03-06'"):
        gym.make_vec("SpecK-v0", 2, "vector_entry_point", trace=folder, k_max=3, date="2026-03-06")
    with pytest.raises(ValueError, match="another date; choose another --out"):
        recorded(Plan("SpecK-v0", env | {"drafter": "lookup", "k_max": 3}, (2, 0, 0)), tmp_path / "trace")
