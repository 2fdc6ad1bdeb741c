"""Wilson's confidence interval of a share."""

import math


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of the share `successes / n` (Wilson 1927), 95 % by default. A tie may be half a success.

    Unlike share +- z * standard error, it stays within 0 and 1, and it has a width at 0 and at n successes.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
