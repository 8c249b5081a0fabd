"""Make the table of megatron_ext/parallel/shown.py from what test_certify.py printed under each megatron-core.

python -m tests.megatron_ext.shown LOG...      prints the lines of SHOWN, then the rows of the manual
"""

import re
import sys
from pathlib import Path

from megatron_ext import versions
from megatron_ext.parallel import shown
from tests.megatron_ext.cells import CELLS

TITLE = re.compile(r"^Parallel equals serial, megatron-core (\S+):")
CELL_OF = {cell.name: cell for cell in CELLS}
Shown = dict[str, dict[str, dict[str, str]]]  # layout -> family -> release -> largest difference, or "refused"


def read(log: str) -> Shown:
    """Read one log. A cell whose rows are one document each is left out: that of many documents has the same layout."""
    lines = iter(log.splitlines())
    release = next(found.group(1) for line in lines if (found := TITLE.match(line)))
    header = next(lines)
    starts = [match.start() for match in re.finditer(r"\S+(?: \S+)*", header)]
    names = [match.group() for match in re.finditer(r"\S+(?: \S+)*", header)]
    found: Shown = {}
    for line in lines:
        name = line[: starts[0]].strip()
        if name not in CELL_OF:
            break
        for family, start, end in zip(names, starts, [*starts[1:], None]):
            text, cell = line[start:end].strip(), CELL_OF[name]
            if text and not cell.whole:
                value = "refused" if text.startswith("refused") else f"{max(map(float, text.split())):.0e}"
                layout = shown.layout(cell.plan, cell.ranks)
                found.setdefault(layout, {}).setdefault(family, {})[release] = value
    return found


def rows(table: Shown) -> list[str]:
    """Return the manual's table: a cell has the largest difference of all releases, and says so where some refuse."""
    families = list(dict.fromkeys(family for of in table.values() for family in of))

    def cell(by_release: dict[str, str]) -> str:
        there = {release: value for release, value in by_release.items() if value != "refused"}
        if not there:
            return "refused" if by_release else ""
        largest = max(there.values(), key=float)
        whole = len(there) == len(by_release) == len(versions.RELEASES)
        return largest if whole else f"{largest} ({', '.join(there)})"

    head = [f"| layout | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    return head + [
        f"| {layout} | {' | '.join(cell(of.get(f, {})) for f in families)} |" for layout, of in table.items()
    ]


def main() -> None:
    table: Shown = {}
    for path in sys.argv[1:]:
        for layout, families in read(Path(path).read_text()).items():
            for family, by_release in families.items():
                table.setdefault(layout, {}).setdefault(family, {}).update(by_release)
    for layout, families in table.items():
        print(f'    "{layout}": {{')
        for family, by_release in families.items():
            values = " ".join(by_release.get(release, "-") for release in versions.RELEASES)
            print(f'        "{family}": "{values}",')
        print("    },")
    print("\n".join(rows(table)))


if __name__ == "__main__":
    main()
