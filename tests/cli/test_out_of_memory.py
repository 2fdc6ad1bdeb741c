"""What a full card or a full machine says is known as a lack of memory, and nothing else is."""

import errno
import os

import pytest
import torch

from qlora_dpo.errors import is_out_of_memory

FULL = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.74 GiB of which 1.12 GiB is free",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    "C10 Out of Memory. Trying to allocate 9 bytes",
]
"""As torch 2.11 to 2.13 have them (CUDACachingAllocator.cpp, ATen/cuda/Exceptions.h, CPUAllocator.cpp), with the names
that cuBLAS and cuDNN 9 give to what went wrong."""


@pytest.mark.parametrize("words", FULL)
def test_a_lack_of_memory_is_known_by_its_words(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))


def test_a_lack_of_memory_is_known_by_its_type_whatever_it_says() -> None:
    class Later(torch.OutOfMemoryError):
        pass

    for error in (torch.OutOfMemoryError("Allocation on device 0"), Later(""), MemoryError()):
        assert is_out_of_memory(error)


def test_a_lack_of_memory_for_a_new_process_is_one() -> None:
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("out of memory"),
    ],
)
def test_another_failure_is_none(error: Exception) -> None:
    assert not is_out_of_memory(error)
