"""Parts of other people's libraries that may go without notice."""

from typing import Any

VLLM = "0.32"
"""The minor version of vLLM whose inner parts serving/vllm knows."""


def require(owner: Any, *names: str) -> None:
    """Raises an error that says which part of a library is gone.

    Python would accept an assignment to a name that nobody reads any more in silence.

    Raises:
        RuntimeError: ``owner``, an object or a class, lacks one of the names.
    """
    for name in names:
        if not hasattr(owner, name):
            kind = owner if isinstance(owner, type) else type(owner)
            library = kind.__module__.partition(".")[0]
            raise RuntimeError(
                f"this version of {library} has no {kind.__name__}.{name} any more, which "
                "bov-lightning relies on: use the versions of constraints.txt"
            )
