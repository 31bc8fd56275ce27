"""Who holds what: ranks, stages and their layers. Pure; ``__main__`` asks it once.

Knows neither torch nor how ranks talk (``link``).
"""

from __future__ import annotations

from .errors import InvalidSpecError


def shares(layers: int, stages: int) -> list[range]:
    """The layers of each stage, in order; the ends hold no more than the middle.

    The first stage also embeds, samples, decodes and publishes, the last one projects, so where the layers do not
    divide, the first stage and then the last get fewer.

    Raises:
        InvalidSpecError: there are more stages than layers.
    """
    if stages > layers:
        raise InvalidSpecError(
            f"the model has {layers} layers, so it cannot be split over {stages} ranks: "
            f"lower spec.nodes, spec.gpusPerNode or spec.ranksPerNode to at most {layers} ranks in all"
        )
    small, extra = divmod(layers, stages)
    ends_first = sorted(range(stages), key=lambda stage: (stage != 0, stage != stages - 1, stage))
    sizes = dict.fromkeys(ends_first, small) | dict.fromkeys(ends_first[stages - extra :], small + 1)
    bounds = [0]
    for stage in range(stages):
        bounds.append(bounds[-1] + sizes[stage])
    return [range(bounds[stage], bounds[stage + 1]) for stage in range(stages)]
