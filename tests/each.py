"""One sentence about many items as one test, whose failure names every item that breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def each(items: Iterable[Any], name: Callable[[Any], object] = str) -> Callable[[Callable], Callable]:
    """Decorator: a check of one item, its first parameter, becomes one test of all items.

    Further parameters are fixtures, shared by the items. Every item is checked, whatever happened to those before;
    the failure lists each offender by `name` with what its check said. No items at all is a failure too.
    """
    items = list(items)

    def decorate(check: Callable) -> Callable:
        def test(**fixtures: Any) -> None:
            offenders = []
            for item in items:
                try:
                    check(item, **fixtures)
                except (Exception, pytest.fail.Exception) as error:
                    offenders.append(f"{name(item)}: {type(error).__name__}: {error}")
            if offenders or not items:
                pytest.fail(f"{len(offenders)} of {len(items)}:\n" + "\n".join(offenders), pytrace=False)

        _, *shared = inspect.signature(check).parameters.values()
        test.__name__, test.__qualname__ = check.__name__, check.__qualname__
        test.__module__, test.__doc__ = check.__module__, check.__doc__
        test.__signature__ = inspect.Signature(shared)  # pyright: ignore[reportFunctionMemberAccess]
        return test

    return decorate
