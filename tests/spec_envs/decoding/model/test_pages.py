"""Copies in huge pages: each has its own memory, which is freed with the last of them."""

from __future__ import annotations

import itertools
import weakref

import torch

from spec_envs.decoding.model.kernels import pages


def test_copies_equal_their_tensors_and_do_not_overlap() -> None:
    place = pages.Pages()
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (1,), (1000, 1000), (7,), (pages.CHUNK // 8 - 100,), (40, 2, 30), (pages.CHUNK // 4 + 1000,), (9,)]
    tensors = [torch.randint(-99, 99, size, generator=generator).to(torch.int32) for size in sizes]
    tensors.append(torch.randn(4, 6).T)
    copies = [place.copy(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy, tensor) and copy.is_contiguous() and copy.data_ptr() % pages.LINE == 0
        copy.fill_(0)  # in the memory of no other copy, which the next ones show
    ranges = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    assert copies[0].data_ptr() % pages.HUGE == 0 and copies[1].data_ptr() - copies[0].data_ptr() == pages.LINE


def test_memory_is_freed_with_the_last_copy_in_it() -> None:
    place = pages.Pages()
    first, second = place.copy(torch.ones(5)), place.copy(torch.ones(6))
    assert place.chunk is not None
    memory = weakref.ref(place.chunk.map)
    third = place.copy(torch.zeros(pages.CHUNK // 2))
    assert memory() is not None and third.data_ptr() % pages.HUGE == 0
    del first
    assert memory() is not None and second.sum() == 6
    del second
    assert memory() is None
