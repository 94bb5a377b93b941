"""All laws at once, and how many faults they find."""

from dataclasses import dataclass, field

from ._claims._base import Claim
from ._controls import WRONG, Control
from ._law import LAWS, LawBroken, NotApplicable
from ._subject import Subject


@dataclass(frozen=True)
class Report:
    """The findings of `check_optimizer`.

    Attributes:
        passed: the laws that hold.
        failed: the laws that are broken, with their messages.
        not_applicable: the laws that say nothing about the claim, with the reasons.
    """

    passed: tuple[str, ...]
    failed: dict[str, LawBroken] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.passed)} laws hold: {', '.join(self.passed) or 'none'}"]
        lines += [f"{name} is broken" for name in self.failed]
        lines += [f"{name} does not apply: {reason}" for name, reason in self.not_applicable.items()]
        return "\n".join(lines)


def examine(subject: Subject, claim: Claim) -> Report:
    """Hold a subject against every law that applies to its claim, and report what holds.

    `check_optimizer` does the same, and raises the first broken law.

    Args:
        subject: the optimizer under test.
        claim: what it says that it is.

    Returns:
        A `Report`. Its `failed` holds every broken law.

    Example:
        >>> from gdfunc import testing as gt
        >>> report = gt.examine(gt.from_transform(gd.lion((0.9, 0.9))), gt.Lion((0.9, 0.99)))
        >>> list(report.failed)
        ['check_flip', 'check_kernel', 'check_batches']
    """
    passed, failed, reasons = [], {}, {}
    for name, check in LAWS.items():
        try:
            check(subject, claim)
        except NotApplicable as reason:
            reasons[name] = str(reason)
        except LawBroken as broken:
            failed[name] = broken
        else:
            passed.append(name)
    return Report(tuple(passed), failed, reasons)


def check_optimizer(subject: Subject, claim: Claim) -> Report:
    """Hold a subject against every law that applies to its claim.

    Args:
        subject: the optimizer under test.
        claim: what it says that it is.

    Returns:
        A `Report` of the laws that hold, and of those that say nothing about the claim, with the reasons.

    Raises:
        LawBroken: a law is broken. It is the first; its notes name the others.

    Example:
        >>> from gdfunc import testing as gt
        >>> wrong = gt.subject(lambda p: (), lambda g, state, p, lr: (p - 0.5 * lr * g, state), "halved")
        >>> try:
        ...     gt.check_optimizer(wrong, gt.GradientDescent())
        ... except gt.LawBroken as broken:
        ...     broken.diagnosis
        'the effective learning rate is 0.5 lr'
    """
    report = examine(subject, claim)
    if not report.failed:
        return report
    first, *others = report.failed
    broken = report.failed[first]
    if others:
        broken.add_note(f"also broken: {', '.join(others)}")
    raise broken


def measure_power(controls: dict[str, Control] | None = None) -> dict[str, tuple[str, ...]]:
    """Return the laws that each negative control breaks, by the name of the control.

    A control that no law finds has an empty tuple.

    Args:
        controls: by their names, such as the part of `WRONG` whose `claim.family` is "lion"; None: all of
            `WRONG`, which takes minutes.

    Example:
        >>> from gdfunc import testing as gt
        >>> one = {name: control for name, control in gt.WRONG.items() if name.endswith("lr squared")}
        >>> "check_kernel" in gt.measure_power(one)["gradient descent: lr squared"]
        True
    """
    chosen = WRONG if controls is None else controls
    return {name: tuple(examine(control.subject, control.claim).failed) for name, control in chosen.items()}
