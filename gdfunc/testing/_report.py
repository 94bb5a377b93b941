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


@dataclass(frozen=True)
class Power:
    """The laws that find each negative control. It prints as a table, law × control.

    Attributes:
        found: the laws that a control breaks, by the name of the control; () if no law finds it.
    """

    found: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        laws = [law for law in LAWS if any(law in row for row in self.found.values())]
        counts = [sum(law in row for row in self.found.values()) for law in laws]
        lines = [
            f"{number:2} {law} finds {count} of {len(self.found)}"
            for number, (law, count) in enumerate(zip(laws, counts, strict=True), 1)
        ]
        width = max(map(len, self.found), default=0)
        numbers = [f"{number:2}" for number in range(1, len(laws) + 1)]
        heads = (" " * (width + 1) + " ".join(digits) for digits in zip(*numbers, strict=True))
        lines += [head for head in heads if head.strip()]
        for name, row in self.found.items():
            lines.append(f"{name:{width}} {' '.join('x' if law in row else '.' for law in laws)}")
        return "\n".join(lines)


def measure_power(controls: dict[str, Control] | None = None) -> Power:
    """Print and return the laws that find each negative control.

    Args:
        controls: by their names, such as the part of `WRONG` whose `claim.family` is "lion"; None: all of
            `WRONG`, which takes minutes.

    Returns:
        A `Power`, the table that is printed.

    Example:
        >>> from gdfunc import testing as gt
        >>> name = "lion: betas swapped"
        >>> power = gt.measure_power({name: gt.WRONG[name]})
         1 check_flip finds 1 of 1
         2 check_kernel finds 1 of 1
         3 check_batches finds 1 of 1
                            1 2 3
        lion: betas swapped x x x
        >>> power.found[name]
        ('check_flip', 'check_kernel', 'check_batches')
    """
    chosen = WRONG if controls is None else controls
    found = {
        name: tuple(examine(control.subject, control.claim).failed) for name, control in chosen.items()
    }
    power = Power(found)
    print(power)
    return power
