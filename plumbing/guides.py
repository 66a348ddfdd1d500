"""Guides as a person writes them: `negative:30,not-sports`."""

import math
from typing import NamedTuple

from plumbing.config import check


class Guide(NamedTuple):
    """A class of a probe to steer towards, or away from, and how much."""

    probe: object  # a `Probe`
    label: int
    away: bool
    weight: float

    def log_prob(self, e):
        """Unit embeddings (..., E) -> log p(class | e), or log(1 - p(class | e)) (...)."""
        log_p = self.probe.log_prob(e)
        if not self.away:
            return log_p[..., self.label]
        others = [i for i in range(len(self.probe.classes)) if i != self.label]
        return log_p[..., others].logsumexp(-1)


def parse_guide(text, probes):
    """`negative:30,sports`, `sentiment=negative`, `not-sports:40` or `none` -> [Guide, ...].

    A weight that is not given is the probe's, for that class. Raises InputError if no probe or more than one
    has the class, or if the weight is not a number, 0 or above.
    """
    check(isinstance(text, str), f"--guide: {text!r} must be a text, such as none or negative:30")
    guides = []
    for item in [] if text.strip() in ("", "none") else text.split(","):
        name, colon, number = (part.strip() for part in item.partition(":"))
        probe_name, _, label = (part.strip() for part in name.rpartition("="))
        away = label.startswith("not-") and not any(label in p.classes for p in probes)
        label = label.removeprefix("not-") if away else label
        found = [p for p in probes if label in p.classes and probe_name in ("", p.name)]
        known = ", ".join(f"{p.name} ({', '.join(p.classes)})" for p in probes) or "none yet, see probes.py"
        check(found, f"--guide: no probe has a class {name!r}; this model's probes: {known}")
        ways = " or ".join(f"{p.name}={label}" for p in found)
        check(len(found) == 1, f"--guide: several probes have a class {label!r}: say {ways}")
        at, two = found[0].classes.index(label), len(found[0].classes) == 2
        try:  # away from one of two classes is towards the other
            weight = float(number) if colon else found[0].weight[1 - at if away and two else at]
        except ValueError:
            weight = math.nan
        check(math.isfinite(weight), f"--guide: the weight in {item!r} is not a number")
        other = label if away else f"not-{label}"
        check(weight >= 0, f"--guide: the weight in {item!r} is negative: say {other}:{-weight:g}")
        guides.append(Guide(found[0], at, away, weight))
    return guides
