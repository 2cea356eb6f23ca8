"""What all tests share: one thread, and the reference folder, where it is there."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REQUIRED = set(filter(None, os.environ.get("BOV_REQUIRE", "").split(",")))
REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("BOV_SHARED", REPOSITORY.parent / "shared"))


def require(condition: bool, name: str, reason: str) -> None:
    """Skips the test, or fails it where BOV_REQUIRE names what is missing."""
    if not condition:
        (pytest.fail if name in REQUIRED else pytest.skip)(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers made by the paper's authors' code."""
    require((SHARED / "parity" / "parity.json").is_file(), "shared", f"{SHARED} is not there")
    return SHARED
