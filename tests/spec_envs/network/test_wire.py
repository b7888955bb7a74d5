"""Messages: their content and length, and that nothing else is accepted."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spec_envs.decoding.sampling import Proposal
from spec_envs.network import wire
from spec_envs.network.cloud.engine import LONGEST_DRAFT, Engine
from spec_envs.network.wire import (
    VERSION,
    Error,
    Hello,
    Message,
    Plain,
    Refused,
    Sent,
    Tokens,
    Verdict,
    Verify,
    Welcome,
    decode,
    encode,
    expect,
    pack_floats,
    pack_ids,
    pack_logits,
    pack_proposal,
    unpack_floats,
    unpack_ids,
    unpack_logits,
    unpack_proposal,
)

KEY, SESSION = b"v" * 16, b"s" * 16
SAMPLED = Hello(VERSION, KEY, SESSION, 0.7, 0.95, 2**63 - 1)
MESSAGES: list[Message] = [
    SAMPLED,
    Welcome(0, 2048, 49_152),
    Verify(1, 0, b"", b"", "ids"),
    Verify(2**31 - 1, 300, b"ab", b"cdef", "scalar", b"8 bytes.8 bytes."),
    Verify(2, 300, b"ab", b"cdef", "topk", b"", [Sent(b"ids ", b"weig"), Sent(b"", b"hts.")]),
    Verdict(2, 1, -1, 0.01, 0.0, b"logits", "float32"),
    Verdict(3, 64, 49_151, 0.01, 1e-6),
    Plain(4, 12, b"ab", 2**20, b"\0\0"),
    Tokens(4, 17, True, 0.01, 0.0, 3),
    Error("busy", "all sessions are taken"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_decode_as_encoded(message: Message) -> None:
    frame = encode(message)
    assert decode(frame) == message
    assert encode(decode(frame)) == frame
    if not isinstance(message, Error):
        assert expect(message, type(message)) is message


@given(st.binary(max_size=80))
def test_any_bytes_are_decoded_or_refused(frame: bytes) -> None:
    try:
        decode(frame)
    except Refused as refused:
        assert refused.code == "message"


@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages_are_decoded_or_refused(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for damaged in (bytes(frame), bytes(frame[:cut]), bytes(frame) + b"\0"):
        try:
            decode(damaged)
        except Refused as refused:
            assert refused.code == "message" and refused.message().code == "message"


@pytest.mark.parametrize(
    "raw",
    [
        [],
        3,
        {"version": 1},
        [9, 1],  # no such kind
        [3, 1],  # incomplete
        [1, VERSION, KEY[1:], SESSION, 1.0, 1.0, 0],
        [1, VERSION, KEY, SESSION, -0.1, 1.0, 0],
        [1, VERSION, KEY, SESSION, math.nan, 1.0, 0],
        [1, VERSION, KEY, SESSION, math.inf, 1.0, 0],
        [1, VERSION, KEY, SESSION, 1.0, 0.0, 0],
        [1, VERSION, KEY, SESSION, 1.0, 1.5, 0],
        [1, VERSION, KEY, SESSION, 1.0, 1.0, -1],
        [1, VERSION, KEY, SESSION, "1", 1.0, 0],
        [3, -1, 0, b"", b"", "ids"],
        [3, 1, 2**31, b"", b"", "ids"],
        [3, 1, 0, b"", b"", "topk", b"", [[b"ab"]]],
        [5, 1, 0, b"ab", 0, b""],
        [5, 1, 0, b"ab", 2**21, b""],
    ],
)
def test_invalid_messages_are_refused(raw: Any) -> None:
    with pytest.raises(Refused) as refused:
        decode(msgspec.msgpack.encode(raw))
    assert refused.value.code == "message" and "version 1" in str(refused.value)


def test_text_not_in_utf_8_is_refused() -> None:
    with pytest.raises(Refused, match="utf-8"):
        decode(b"\x93\x07\xa1\x80\xa0")  # an error whose code is not UTF-8


def test_text_frames_and_other_kinds_are_refused() -> None:
    with pytest.raises(Refused, match="text frame"):
        decode("hello")
    with pytest.raises(Refused, match="received Tokens; expected Verdict"):
        expect(Tokens(1, 2, True, 0.0, 0.0, 0), Verdict)
    with pytest.raises(Refused, match="come later") as refused:
        expect(Error("busy", "come later"), Verdict)
    assert refused.value.code == "busy" and refused.value.code in wire.LATER


def number(n: int) -> int:
    """Return the number of bytes of a non-negative integer in msgpack."""
    return 1 if n < 128 else 2 if n < 256 else 3 if n < 2**16 else 5


def array(n: int) -> int:
    """Return the number of bytes of the prefix of an array of ``n`` elements."""
    return 1 if n < 16 else 3


def data(n: int) -> int:
    """Return the number of bytes of ``n`` bytes with their prefix."""
    return n + (2 if n < 2**8 else 3 if n < 2**16 else 5)


@pytest.mark.parametrize("vocab", [16, 49_152, 2**16, 2**16 + 1, 151_936])
@pytest.mark.parametrize("drafted", [0, 1, 4, 20])
@pytest.mark.parametrize("k", [1, 8, 50, 5000])
def test_length_of_drafts_equals_calculation(vocab: int, drafted: int, k: int) -> None:
    """A message has a header, ``drafted`` ids, and for each of them k ids with weights, or the weights of the whole
    vocabulary."""
    width = 2 if vocab <= 65_536 else 4
    k = min(k, vocab)
    text, draft = pack_ids([1] * 3, vocab), pack_ids([0] * drafted, vocab)
    assert len(text) == 3 * width
    header = array(8) + number(3) + number(5) + number(1000) + data(3 * width) + data(drafted * width)

    chances = pack_floats([0.5] * drafted)
    assert len(encode(Verify(5, 1000, text, draft, "scalar", chances))) == header + 7 + data(8 * drafted) + array(0)
    assert len(encode(Verify(5, 1000, text, draft, "ids"))) == header + 4 + data(0) + array(0)

    sent = [pack_proposal(Proposal(np.arange(k), np.ones(k, np.float16)), vocab)] * drafted
    sparse, dense = k * (width + 2), vocab * 2
    each = array(2) + (data(k * width) + data(k * 2) if sparse <= dense else data(0) + data(dense))
    assert len(encode(Verify(5, 1000, text, draft, "topk", b"", sent))) == (
        header + 5 + data(0) + array(drafted) + drafted * each
    )


@pytest.mark.parametrize(("vocab", "longest"), [(16, 8), (17, 8), (65_536, 32_768), (65_537, 21_845)])
def test_whole_vocabulary_is_sent_if_shorter(vocab: int, longest: int) -> None:
    """k ids with weights are compared with ``vocab`` weights: they are equal at half of it, or a third with 4-byte
    ids."""
    for k, whole in ((longest, False), (longest + 1, True)):
        sent = pack_proposal(Proposal(np.arange(k), np.ones(k, np.float16)), vocab)
        assert (not sent.ids) == whole
        assert len(sent.ids) + len(sent.weights) <= 2 * vocab


@pytest.mark.parametrize("vocab", [65_536, 65_537])
def test_ids_have_the_narrowest_width(vocab: int) -> None:
    ids = [0, 255, 256, vocab - 1]
    packed = pack_ids(ids, vocab)
    assert len(packed) == 4 * (2 if vocab == 65_536 else 4)
    assert unpack_ids(packed, vocab).tolist() == ids
    assert packed[:6] == (b"\0\0\xff\0\0\1" if vocab == 65_536 else b"\0\0\0\0\xff\0")  # little-endian
    with pytest.raises(Refused, match="multiple") as refused:
        unpack_ids(packed[:-1], vocab)
    assert refused.value.code == "message"


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(Refused, match="received token 16; expected ids below 16") as refused:
        unpack_ids(pack_ids([3, 16], 16), 16)
    assert refused.value.code == "request"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_logits_are_packed_without_loss(dtype: str) -> None:
    logits = torch.randn(16, dtype=torch.float64).to(getattr(torch, dtype))
    logits[3] = -torch.inf
    packed, name = pack_logits(logits)
    assert name == dtype and len(packed) == 16 * logits.itemsize
    back = unpack_logits(packed, name, 16)
    assert back.dtype == logits.dtype and torch.equal(back, logits)
    for wrong in ((packed[:-1], dtype, 16), (packed, dtype, 15), (packed, "int64", 16), (packed, "", 16)):
        with pytest.raises(Refused) as refused:
            unpack_logits(*wrong)
        assert refused.value.code == "message"


def test_floats_are_packed_without_loss() -> None:
    values = np.array([1.0, 1 / 3, 5e-324])
    assert unpack_floats(pack_floats(values)).tobytes() == values.tobytes()
    with pytest.raises(Refused, match="multiple of 8"):
        unpack_floats(b"123456789")


@st.composite
def proposals(draw: st.DrawFn) -> tuple[Proposal, int]:
    """Draw a distribution over part of a vocabulary, with weights over many orders of magnitude; and the
    vocabulary's size."""
    vocab = draw(st.sampled_from([5, 16, 300, 65_536, 70_000]))
    n = draw(st.integers(1, min(vocab, 40)))
    ids = draw(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n, unique=True))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    logs = draw(arrays(np.float64, n, elements=st.floats(-80, 0)))
    return Proposal(np.array(ids), np.exp(logs).astype(dtype)), vocab


@given(proposals(), st.integers(1, 50), st.randoms())
def test_both_sides_compute_the_same_distribution(given: tuple[Proposal, int], k: int, random: Any) -> None:
    """Weights in float16 have exact sums in float64, so order and layout do not matter."""
    whole, vocab = given
    cut = whole.truncated(k)
    assert cut.weights.dtype == np.float16
    assert cut.weights.astype(np.float64).sum() == math.fsum(cut.weights.tolist())
    here = cut.dense(vocab)
    frame = encode(Verify(1, 0, b"", b"", "topk", b"", [pack_proposal(cut, vocab)]))
    there = unpack_proposal(expect(decode(frame), Verify).proposals[0], vocab)
    assert there.tobytes() == here.tobytes()

    dense = np.zeros(vocab, "<f2")
    dense[cut.ids] = cut.weights
    layouts = [Sent(pack_ids(cut.ids, vocab), cut.weights.tobytes()), Sent(b"", dense.tobytes())]
    assert all(unpack_proposal(sent, vocab).tobytes() == here.tobytes() for sent in layouts)
    order = random.sample(range(len(cut.ids)), len(cut.ids))
    assert Proposal(cut.ids[order], cut.weights[order]).dense(vocab).tobytes() == here.tobytes()
    assert all(cut.probability(token) == here[token] for token in cut.ids.tolist())


def sent(ids: list[int], weights: list[float]) -> Sent:
    return Sent(pack_ids(ids, 16), np.array(weights, "<f2").tobytes())


@pytest.mark.parametrize(
    ("distribution", "code"),
    [
        (Sent(b"\1\0", b"\0"), "message"),  # half a weight
        (Sent(b"\1", b"\0\x3c"), "message"),  # half an id
        (sent([1, 2], [1.0]), "request"),
        (sent([1], [1.0, 1.0]), "request"),
        (sent([], [1.0] * 15), "request"),
        (sent([], []), "request"),
        (sent([1, 1], [1.0, 1.0]), "request"),
        (sent([1, 16], [1.0, 1.0]), "request"),
        (sent([1, 2], [0.0, 0.0]), "request"),
        (sent([1, 2], [1.0, -1.0]), "request"),
        (sent([1, 2], [1.0, math.nan]), "request"),
        (sent([1, 2], [1.0, math.inf]), "request"),
    ],
)
def test_invalid_distributions_are_refused(distribution: Sent, code: str) -> None:
    with pytest.raises(Refused) as refused:
        unpack_proposal(distribution, 16)
    assert refused.value.code == code


def engine(context: int = 128) -> Engine:
    """Return an engine whose target cannot compute."""
    shape = SimpleNamespace(vocab=16, context=context)
    slots = SimpleNamespace(lengths=np.zeros(1, np.int64))
    target: Any = SimpleNamespace(shape=shape, slots=lambda sessions, capacity: slots)
    return Engine(target, KEY)


ONE = [sent([1], [1.0])]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Verify(1, 1, b"", b"", "ids"), "request"),  # after a text that the session does not have
        (Verify(1, 0, b"", b"", "ids"), "request"),  # without any text
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "trees"), "request"),
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "ids"), "request"),  # while sampling
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "topk"), "request"),  # without a distribution
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "topk", b"", 2 * ONE), "request"),
        # which does not contain the token
        (Verify(1, 0, pack_ids([3], 16), pack_ids([2], 16), "topk", b"", ONE), "request"),
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "scalar"), "request"),
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "scalar", pack_floats([0.0])), "request"),
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "scalar", pack_floats([math.nan])), "request"),
        (Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "scalar", b"1234"), "message"),
        (Verify(1, 0, pack_ids([3], 16), b"\1", "scalar", pack_floats([0.5])), "message"),
        (Verify(1, 0, pack_ids([16], 16), b"", "ids"), "request"),
        (Verify(1, 0, pack_ids([3] * 128, 16), b"", "ids"), "limit"),
        (
            Verify(1, 0, pack_ids([3], 16), pack_ids([1] * (n := LONGEST_DRAFT + 1), 16), "topk", b"", n * ONE),
            "limit",
        ),
        (Plain(1, 0, pack_ids([3], 16), 128, b""), "limit"),
        (Plain(1, 0, b"", 4, b""), "request"),
        (Plain(1, 0, pack_ids([3], 16), 4, pack_ids([16], 16)), "request"),
    ],
)
def test_invalid_requests_are_refused(request_: Verify | Plain, code: str) -> None:
    cloud = engine()
    with pytest.raises(Refused) as refused:
        cloud.job(cloud.open(SAMPLED), request_)
    assert refused.value.code == code


def test_valid_requests_are_accepted() -> None:
    cloud = engine()
    session = cloud.open(SAMPLED)
    job = cloud.job(session, Verify(1, 0, pack_ids([3], 16), pack_ids([1], 16), "topk", b"", ONE))
    assert job.text.tolist() == [3] and job.draft.tolist() == [1] and job.probabilities == [1]
    cloud.job(session, Plain(1, 0, pack_ids([3], 16), 127, b""))


def test_incompatible_greetings_are_refused() -> None:
    cloud = engine()
    for changes, code in (
        ({"version": VERSION + 1}, "version"),
        ({"vocabulary": SESSION}, "vocabulary"),
    ):
        with pytest.raises(Refused) as refused:
            cloud.open(msgspec.structs.replace(SAMPLED, **changes))
        assert refused.value.code == code
    session = cloud.open(SAMPLED)
    assert cloud.open(SAMPLED) is session
    with pytest.raises(Refused) as refused:
        cloud.open(msgspec.structs.replace(SAMPLED, session=KEY))
    assert refused.value.code == "busy" and refused.value.code in wire.LATER
    cloud.close(session)
    cloud.open(msgspec.structs.replace(SAMPLED, session=KEY))


@given(proposals(), st.integers(1, 50), st.lists(st.floats(0, 1, exclude_max=True), max_size=5))
def test_truncated_proposal_keeps_largest_weights(given: tuple[Proposal, int], k: int, uniforms: list[float]) -> None:
    whole, vocab = given
    cut = whole.truncated(k)
    order = np.argsort(-whole.weights, kind="stable")[: len(cut.ids)]
    assert 1 <= len(cut.ids) <= min(k, len(whole.ids))
    assert cut.ids.tolist() == whole.ids[order].tolist()
    assert cut.weights[0] == 1 and (cut.weights > 0).all() and (np.diff(cut.weights) <= 0).all()
    dense = cut.dense(vocab)
    assert abs(dense.sum() - 1) < 1e-12 and np.count_nonzero(dense) == len(cut.ids)
    again = cut.truncated(k)
    assert again.ids.tolist() == cut.ids.tolist() and again.weights.tobytes() == cut.weights.tobytes()
    for proposal, u in itertools.product((whole, cut), uniforms):
        assert proposal.draw(u) in proposal.ids


def test_draws_follow_the_proposal() -> None:
    proposal = Proposal(np.array([7, 2, 9]), np.array([1.0, 2.0, 1.0]))
    drawn = [proposal.draw(u) for u in (np.arange(400) + 0.5) / 400]
    assert [drawn.count(token) for token in (7, 2, 9)] == [100, 200, 100]
    assert [proposal.probability(token) for token in (7, 2, 9, 3)] == [0.25, 0.5, 0.25, 0]
    assert Proposal.certain(3).draw(0.99) == 3 and Proposal.certain(3).probability(3) == 1
    assert proposal.truncated(2).ids.tolist() == [2, 7]  # of equal weights, the first ones
    assert Proposal(np.arange(2), np.array([1.0, 1e-9])).truncated(2).ids.tolist() == [0]
