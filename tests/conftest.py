"""What the tests share: one thread, small embedded data, and real data where there is any."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from modlib.data import Dataset, load


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """One thread, for two workers on two cores; `make everywhere` asks for two."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """512 training and 200 test images of 8×8 digits."""
    return load("digits").subset(n_train=512, n_test=200)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of prepared real data sets; tests that need it are skipped without it."""
    folder = os.environ.get("MODLIB_DATA")
    if not folder:
        pytest.skip("needs real data: set MODLIB_DATA to a folder of prepared data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def processes() -> Any:
    """Processes that begin with everything imported, and without this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modlib.experiments", "sklearn.datasets", "torch._dynamo"])
    return context
