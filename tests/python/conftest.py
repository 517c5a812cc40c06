"""Fixtures of all tests; what needs a GPU is marked ``cuda`` and skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torch_ext.testing import Case, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``case`` runs for every optimizer and variant of tests/optim_db.json."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine (make gpu-check runs it)"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors and several test processes: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def not_applicable(request: pytest.FixtureRequest) -> None:
    """Skips what the test's module lists in NOT_APPLICABLE: {(test, optimizer, variant or "*"): reason}.

    The optimizer is that of the parameter ``case``, or its name in the parameter ``name``.
    """
    table: dict[tuple[str, str, str], str] = getattr(request.module, "NOT_APPLICABLE", {})
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    case: Case | None = params.get("case")
    optimizer, variant = (params.get("name"), "*") if case is None else (case.optimizer, case.variant)
    if not isinstance(optimizer, str):
        return
    test = request.function.__name__
    reason = table.get((test, optimizer, variant)) or table.get((test, optimizer, "*"))
    if reason is not None:
        pytest.skip(reason)
