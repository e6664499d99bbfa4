from pathlib import Path

import pytest

from tests.torture.killing import Bench
from tests.torture.warm import Warm


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torture")


@pytest.fixture(scope="session")
def llama(folder: Path, warm: Warm) -> Bench:
    return Bench("llama", folder, warm)


@pytest.fixture(scope="session")
def sd(folder: Path, warm: Warm) -> Bench:
    return Bench("sd", folder, warm)
