"""One table of every compared quantity ends the output (it is printed by tests/conftest.py)."""

from collections.abc import Callable

import pytest


@pytest.fixture
def measured(record_property) -> Callable[[str, str, float, float], None]:
    """measured(where, quantity, error, bound): a row of the table, and the comparison itself."""

    def compare(where: str, quantity: str, error: float, bound: float) -> None:
        record_property("parity", [where, quantity, float(error), float(bound)])
        assert error <= bound, f"{where}: {quantity} differs by {error:.2e}, allowed {bound:.0e}"

    return compare
