"""Places the phases of a run as a graph: each below all that it needs.

A line that passes a phase's level takes a lane of its own there, so that none runs behind a box: all lines from one
phase share theirs until they part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

BOX, GAP = (132, 40), (18, 30)  # width and height of a phase, and the room between two
LANE = 6  # width of a line that passes by
MARGIN = 2


@dataclass(frozen=True)
class Node:
    """A phase at the place of its upper left corner, in pixels."""

    phase: str
    x: float
    y: float
    title: str  # as much of the name as the box holds


@dataclass(frozen=True)
class Edge:
    """A dependency, as the path from what is needed to what needs it."""

    path: str
    type: str
    told: str


@dataclass(frozen=True)
class Graph:
    """All phases and dependencies of a run, and the size of their drawing in pixels."""

    width: float
    height: float
    nodes: list[Node]
    edges: list[Edge]


Place = tuple[str, int]  # a phase and a level: the phase's box where it is its own, else the lane of its lines


def graph_of(needs: Mapping[str, Mapping[str, str]]) -> Graph:
    """Return the drawing of {phase: {need: dependency type}}, whose phases stand in an order that runs."""
    level: dict[str, int] = {}
    for phase, above in needs.items():
        level[phase] = max((level[need] + 1 for need in above if need in level), default=0)
    lowest = dict(level)  # where the last line from a phase ends
    for phase, above in needs.items():
        for need in above:
            lowest[need] = max(lowest[need], level[phase])
    levels: dict[int, list[Place]] = {n: [] for n in sorted(set(level.values()))}
    for phase, own in level.items():
        for n in range(own, max(own + 1, lowest[phase])):
            levels[n].append((phase, n))
    width = max((sum(_width(place, level) + GAP[0] for place in places) for places in levels.values()), default=GAP[0])
    middle: dict[Place, float] = {}
    for places in levels.values():
        wanted = {place: _wanted(place, needs, level, middle, width) for place in places}
        middle |= _placed(sorted(places, key=wanted.__getitem__), wanted, level, width)
    edges = [
        Edge(_path(need, phase, level, middle), type_, f"{phase} needs {need} ({type_})")
        for phase, above in needs.items()
        for need, type_ in above.items()
    ]
    nodes = [
        Node(
            phase=phase,
            x=middle[phase, n] - BOX[0] / 2,
            y=_top(n),
            title=phase if len(phase) < 18 else f"{phase[:16]}…",
        )
        for phase, n in level.items()
    ]
    return Graph(width, _top(len(levels)) - GAP[1] + MARGIN, nodes, edges)


def _top(level: int) -> float:
    return MARGIN + level * (BOX[1] + GAP[1])


def _width(place: Place, level: Mapping[str, int]) -> float:
    phase, n = place
    return BOX[0] if level[phase] == n else LANE


def _wanted(
    place: Place,
    needs: Mapping[str, Mapping[str, str]],
    level: Mapping[str, int],
    middle: Mapping[Place, float],
    width: float,
) -> float:
    """Return where a box or lane would best stand: below where its lines come from."""
    phase, n = place
    if level[phase] < n:
        return middle[phase, n - 1]
    above = [middle[need, n - 1] for need in needs[phase]]
    return sum(above) / len(above) if above else width / 2


def _placed(
    places: list[Place], wanted: Mapping[Place, float], level: Mapping[str, int], width: float
) -> dict[Place, float]:
    """Return the middles of what stands on one level, each as near to where it would as the others leave room."""
    middles, right = list[float](), GAP[0] / 2
    for place in places:
        half = _width(place, level) / 2
        middles.append(max(wanted[place], right + half))
        right = middles[-1] + half + GAP[0]
    left = width - GAP[0] / 2
    for number in reversed(range(len(places))):
        half = _width(places[number], level) / 2
        middles[number] = min(middles[number], left - half)
        left = middles[number] - half - GAP[0]
    return dict(zip(places, middles))


def _path(need: str, phase: str, level: Mapping[str, int], middle: Mapping[Place, float]) -> str:
    """Return the path of one dependency: a curve from level to level, straight through its lanes."""
    x, y = middle[need, level[need]], _top(level[need]) + BOX[1]
    path = f"M{x:.1f} {y:.1f}"
    for n in range(level[need] + 1, level[phase] + 1):
        x_to, y_to = middle[phase if n == level[phase] else need, n], _top(n)
        bend = GAP[1] / 2
        path += f"C{x:.1f} {y + bend:.1f} {x_to:.1f} {y_to - bend:.1f} {x_to:.1f} {y_to:.1f}"
        x, y = x_to, y_to + BOX[1]
        if n < level[phase]:
            path += f"V{y:.1f}"
    return path
