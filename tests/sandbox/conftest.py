"""A sandbox whose programs have a minute: a machine that is busy stops a right program no sooner than a hanging one."""

import pytest

from gristmill.sandbox.sandbox import Sandbox, SandboxResult


class PatientSandbox(Sandbox):
    def run(self, program: str, check: str, timeout_s: float = 60.0) -> SandboxResult:
        return super().run(program, check, timeout_s)


@pytest.fixture(scope="session")
def make_sandbox() -> type[Sandbox]:
    return PatientSandbox
