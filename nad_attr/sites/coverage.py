"""Whether the gate sites that were found cover the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ELSEWHERE", "NetworkCheckWarning"]


class NetworkCheckWarning(UserWarning):
    """Gates learned from this network may not be true; the message says why."""


#: How sites are named if not by ``layers=``.
ELSEWHERE = " (sites= for learning, --layer on the command line)"


def poor_coverage(
    gaps: Sequence[tuple[str, str, int, Sequence[str], Mapping[str, int]]],
    n_operators: int,
    not_called: Sequence[str],
) -> str | None:
    """A warning about gate sites that leave out much of a network; None: they cover it.

    Args:
        gaps: For each stretch without a site: the site before and after it ("": input, output), the
            number of operators in it that form new channels, modules inside that could have a gate,
            and modules that make most of it, with how often a pass calls them.
        n_operators: Such operators in the whole network.
        not_called: Modules with weights that this pass did not call.
    """
    parts = []
    for before, after, n, inside, repeated in gaps:
        where = f"{repr(before) if before else 'the input'} and "
        where += repr(after) if after else "the output"
        text = f"no site covers the {n} of {n_operators} layers between {where}"
        if inside and not repeated:
            few = [inside[i * len(inside) // 6] for i in range(6)] if len(inside) > 6 else inside
            text += f"; name some of them, such as layers={list(dict.fromkeys(few))}{ELSEWHERE}"
        elif repeated:
            name, times = next(iter(repeated.items()))
            text += (
                f"; module {name!r} is called {times} times in a pass, so that one gate would act "
                "in several places: give each place a module of its own, or run the branches as "
                "one batch"
            )
        parts.append(text)
    if not_called:
        parts.append(
            f"the network looks at values and did not call {', '.join(map(repr, not_called[:4]))}"
            f"{' and others' if len(not_called) > 4 else ''} for this image: the sites are those "
            f"of one path. Name modules that every image passes, with layers={ELSEWHERE}"
        )
    return None if not parts else "the gate sites cover little of the network: " + ". ".join(parts)
