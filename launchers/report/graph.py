"""Places the phases of a run as a graph: each below all that it needs."""

from collections.abc import Mapping
from dataclasses import dataclass

BOX, GAP = (132, 40), (18, 30)  # width and height of a phase, and the room between two


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


def graph_of(needs: Mapping[str, Mapping[str, str]]) -> Graph:
    """Return the drawing of {phase: {need: dependency type}}, whose phases stand in an order that runs."""
    depth: dict[str, int] = {}
    for phase, above in needs.items():
        depth[phase] = max((depth[need] + 1 for need in above if need in depth), default=0)
    lines: dict[int, list[str]] = {}
    for phase, line in depth.items():
        lines.setdefault(line, []).append(phase)
    widest = max(map(len, lines.values()), default=1)
    width = widest * (BOX[0] + GAP[0]) - GAP[0]
    corner: dict[str, tuple[float, float]] = {}
    for line, phases in sorted(lines.items()):
        wanted = {phase: _middle_of(needs[phase], corner, width) for phase in phases}
        corner |= _placed(sorted(phases, key=wanted.__getitem__), wanted, line, width)
    edges = [
        Edge(_curve(corner[need], corner[phase]), type_, f"{phase} needs {need} ({type_})")
        for phase, above in needs.items()
        for need, type_ in above.items()
        if need in corner
    ]
    nodes = [Node(phase, x, y, phase if len(phase) < 18 else f"{phase[:16]}…") for phase, (x, y) in corner.items()]
    return Graph(width, len(lines) * (BOX[1] + GAP[1]) - GAP[1], nodes, edges)


def _middle_of(above: Mapping[str, str], corner: Mapping[str, tuple[float, float]], width: float) -> float:
    """Return where a phase would best stand: in the middle of what it needs."""
    places = [corner[need][0] for need in above if need in corner]
    return sum(places) / len(places) if places else (width - BOX[0]) / 2


def _placed(phases: list[str], wanted: Mapping[str, float], line: int, width: float) -> dict[str, tuple[float, float]]:
    """Return the corners of the phases of one line, each as near to where it would stand as the others leave room."""
    step, places = BOX[0] + GAP[0], list[float]()
    for phase in phases:
        places.append(max(wanted[phase], places[-1] + step if places else 0.0))
    limit = width - BOX[0]
    for place in reversed(range(len(places))):
        places[place] = min(places[place], limit)
        limit = places[place] - step
    return {phase: (x, line * (BOX[1] + GAP[1])) for phase, x in zip(phases, places)}


def _curve(need: tuple[float, float], phase: tuple[float, float]) -> str:
    x, y = need[0] + BOX[0] / 2, need[1] + BOX[1]
    x_to, y_to = phase[0] + BOX[0] / 2, phase[1]
    bend = (y_to - y) / 2
    return f"M{x:.1f} {y:.1f}C{x:.1f} {y + bend:.1f} {x_to:.1f} {y_to - bend:.1f} {x_to:.1f} {y_to:.1f}"
