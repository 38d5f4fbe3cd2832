"""On which side of its nonlinearity a layer ends, and with it a module that is cut there.

"before": each layer begins with the nonlinearity of the one before it, where the theorems of proxy
objectives want a cut. "after": each ends with its own, as in papers on auxiliary heads and on target
propagation. The network computes the same.
"""

from __future__ import annotations


def check_boundary(boundary: str) -> None:
    """Refuse what is neither side.

    Raises:
        ValueError: ``boundary`` is not "before" or "after".

    >>> check_boundary("inside")
    Traceback (most recent call last):
    ValueError: boundary='inside': choose 'before' or 'after' the nonlinearity.
    """
    if boundary not in ("before", "after"):
        raise ValueError(f"boundary={boundary!r}: choose 'before' or 'after' the nonlinearity.")
