"""The kernels' structures and signatures, as ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from spec_envs.decoding.model import kernels

NO_MEMORY = 2  # status of a kernel that could not allocate memory
BFLOAT16, OUTPUTS = 0, 1  # kinds of an embedding


class CMatrix(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("kind", c_int64),
        ("next", c_void_p),
    ]


class CLayer(Structure):
    _fields_ = [
        *((name, CMatrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim")),
        ("eps", c_float),
    ]


class CCache(Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("size", "layers", "sequences", "capacity", "batch", "length")),
        *((name, c_void_p) for name in ("slots", "lengths")),
    ]


class CAdded(Structure):
    _fields_ = [
        *(
            (f"{name}_{side}", kind)
            for name in ("qkv", "out")
            for side, kind in (("down", c_void_p), ("up", c_void_p), ("rank", c_int64))
        ),
    ]


class CTables(Structure):
    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("rows", c_int64)]


class CEmbedding(Structure):
    _fields_ = [("rows", c_void_p), ("kind", c_int64), ("vocabulary", c_int64)]


class CText(Structure):
    _fields_ = [
        ("layers", POINTER(CLayer)),
        ("count", c_int64),
        ("embedding", CEmbedding),
        ("tables", CTables),
        ("norm", c_void_p),
        ("head", CMatrix),
        ("cache", CCache),
        ("room", c_int64),
        *((name, c_void_p) for name in ("tokens", "parents", "kept", "hidden")),
        *((name, POINTER(c_void_p)) for name in ("captured", "states")),
        ("wanted", c_int64),
        ("choices", c_void_p),
    ]


class CFusion(Structure):
    _fields_ = [("product", CMatrix), ("norms", POINTER(c_void_p)), ("states", c_int64), ("joined", c_void_p)]


class CDrafter(Structure):
    _fields_ = [
        ("layers", POINTER(CLayer)),
        ("count", c_int64),
        ("embedding", CEmbedding),
        *((name, c_void_p) for name in ("input_norm", "hidden_norm", "norm")),
        ("fusion", CFusion),
        ("tables", CTables),
        ("head", CMatrix),
        ("outputs", c_int64),
    ]


def library() -> ctypes.CDLL:
    """Return the compiled kernels with their signatures.

    Raises:
        ValueError: they are not available here.
    """
    found = kernels.library()
    if found is None:
        raise ValueError(
            "dtypes int8 and q4 need the compiled kernels; install a C++ compiler (g++), or pass another dtype"
        )
    if found.forward.argtypes is None:
        pointer, number = c_void_p, c_int64
        found.rms_norm.argtypes = [pointer, pointer, number, number, c_float, pointer]
        product = [POINTER(CMatrix), pointer, number, pointer, c_float, pointer]
        found.linear.argtypes = [*product, number, number]
        found.linear_argmax.argtypes = [*product, number]
        found.weight_rows.argtypes = [POINTER(CMatrix), pointer, number, pointer]
        logits = [pointer, number, number, pointer, number]
        found.most_probable.argtypes = [*logits, number, number, pointer, pointer, pointer, number]
        rows = [pointer, pointer, POINTER(CCache), number, pointer, POINTER(CTables), pointer, number, pointer, pointer]
        found.forward.argtypes = [POINTER(CLayer), number, number, *rows, POINTER(CAdded), number]
        rows = [pointer, number, pointer, number, pointer, pointer, number, pointer, POINTER(CCache), pointer, number]
        best = [number, pointer, number, number, pointer, pointer, pointer, number]
        found.draft.argtypes = [POINTER(CDrafter), *rows, *best]
        found.read_rows.argtypes = [POINTER(CText), number, number, number, POINTER(CAdded), number]
        found.keep_rows.argtypes = [POINTER(CText), number, pointer]
        found.read_all.argtypes = [pointer, number, number]
        found.read_all.restype = number
        for name in ("rms_norm", "most_probable"):
            getattr(found, name).restype = None
        for name in ("linear", "linear_argmax", "weight_rows", "forward", "draft", "read_rows", "keep_rows"):
            getattr(found, name).errcheck = check_status
    return found


def check_status(status: int, function: Any, arguments: tuple[Any, ...]) -> None:
    """Raise IndexError if a kernel returned that rows do not fit, MemoryError if it returned that memory ran out."""
    if status == NO_MEMORY:
        raise MemoryError("there is not enough memory for so many rows; pass a shorter text")
    if status:
        raise IndexError("rows do not fit the cache, the context or the vocabulary")


def floats(x: Tensor) -> Tensor:
    """Return x in contiguous float32."""
    return x.to(torch.float32).contiguous()


def address(x: Tensor | None) -> int | None:
    """Return the address of a tensor's data; None for None."""
    return None if x is None else x.data_ptr()
