"""Whether a relay lives and whether it is ready to serve, from its snapshot, in plain words."""

from __future__ import annotations

from relay.snapshot import Snapshot


def health_problems(snapshot: Snapshot) -> list[str]:
    """What a restart might mend; empty for a relay that is alive."""
    return [snapshot.pump_problem] if snapshot.pump_problem else []


def readiness_problems(snapshot: Snapshot, unix_time: float, wanted_workers: int) -> list[str]:
    """Why clients should not be sent here now; empty for a relay that is ready."""
    problems = health_problems(snapshot)
    if snapshot.is_draining:
        problems.append("the relay is draining: it was told to stop")
    if snapshot.workers < wanted_workers:
        problems.append(f"only {snapshot.workers} of {wanted_workers} workers answer")
    certificate = snapshot.certificate
    if certificate is not None:
        if not certificate.ready:
            problems.append("there is no certificate yet; the ACME authority is still being asked")
        elif certificate.not_after_unix <= unix_time:
            problems.append("the certificate has expired")
    if snapshot.admission is not None and snapshot.admission.hook_is_failing:
        problems.append("the admission hook does not answer")
    return problems
