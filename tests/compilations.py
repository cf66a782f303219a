"""How many programs the tests compile and how long that takes, over all of pytest's workers.

A program counts as compiled when this process has it made, by XLA or from the folder of compiled programs: so a cold
run and a warm one count alike. Child processes of tests are not counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

KINDS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
NAME = "compilations"  # of what a worker's reports carry
LONGEST = 20


class Compilations:
    """Counts in the process that runs a test, adds up in the one that reports, and judges a whole default run."""

    def __init__(self, show: bool, budget: int | None) -> None:
        self.show, self.budget = show, budget
        self.now: Counter[str] = Counter()
        self.by_test: dict[str, Counter[str]] = defaultdict(Counter)
        self.is_listening = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        """Puts into the report of a phase what was compiled in it; the first test's begins with the imports' own."""
        report = yield
        if self.now:
            report.user_properties = [*report.user_properties, (NAME, dict(self.now))]
            self.now.clear()
        return report

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Listens from the first test on: not in the process that only distributes tests, which never imports JAX."""
        if self.is_listening:
            return
        import jax

        def count(event: str, seconds: float, **about: object) -> None:
            if event in KINDS:
                self.now[KINDS[event]] += seconds
                self.now["programs"] += KINDS[event] == "compile"

        jax.monitoring.register_event_duration_secs_listener(count)
        self.is_listening = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds a phase's counts to its test's."""
        for name, counts in report.user_properties:
            if name == NAME:
                self.by_test[report.nodeid].update(counts)

    @property
    def total(self) -> Counter[str]:
        """Of all tests."""
        return sum(self.by_test.values(), Counter())

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fails a run that compiled more than it may."""
        is_worker = hasattr(session.config, "workerinput")
        if not is_worker and self.is_over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @property
    def is_over(self) -> bool:
        """Whether more programs were compiled than the budget has."""
        return self.budget is not None and self.total["programs"] > self.budget

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """One line for the run; with --compilations one for each of the tests that compiled longest."""
        total, write = self.total, terminalreporter.write_line
        if self.show:
            terminalreporter.section(f"the {LONGEST} tests that compiled longest (seconds)")
            write(" programs" + "".join(f"{kind:>9s}" for kind in KINDS.values()) + "  test")
            ranked = sorted(self.by_test.items(), key=lambda pair: -pair[1]["compile"])
            for name, found in ranked[:LONGEST]:
                write(f"{line_of(found)}  {name}")
            write(f"{line_of(total)}  all")
        if self.is_over:
            write(f"{total['programs']} programs were compiled; the budget is {self.budget}", red=True)


def line_of(found: Counter[str]) -> str:
    """Four columns."""
    return f"{found['programs']:9d}" + "".join(f"{found[kind]:9.1f}" for kind in KINDS.values())
