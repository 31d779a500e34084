"""What would be read of a folder of photographs, on a page."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from derm_compress.data import splits
from derm_compress.data.load import FOLDER
from derm_compress.data.preset import Preset, read_preset
from derm_compress.data.request import Request
from derm_compress.data.rows import Survey

WIDTH, MARGIN, SHOWN = 100, 12, 12  # of a line, of its title, values that are shown of many


def page(request: Request, found: Survey) -> str:
    """What a run of this request would read, group, map and leave out."""
    lines = [f"{request.data_root}, read as source {request.source}"]
    if request.source != FOLDER:
        lines += published(read_preset(request.source))
    lines += [*how(found), *labels(found), *groups(found), *subgroups(found)]
    lines += paragraph("notes", found.told.get("notes", []))
    lines += paragraph("WOULD STOP", found.problems)
    return "\n".join(lines)


def published(preset: Preset) -> list[str]:
    return [
        *paragraph("data set", [f"{preset.title}, {preset.url}"]),
        *paragraph("cite", [preset.citation]),
        *paragraph("licence", [preset.licence]),
        *paragraph("contents", [preset.contents]),
        *paragraph("remarks", preset.remarks),
        *paragraph("UNCHECKED", preset.unchecked),
    ]


def how(found: Survey) -> list[str]:
    """The table, its columns and the files that it names."""
    told = found.told.get("read_as", {})
    missing = [row for row in found.rows if row.path is None]
    there = f"{len(found.rows) - len(missing)} of {len(found.rows)} are there"
    lines = []
    if told:
        form = f" ({told['form']})" if told["form"] else ""
        lines += paragraph("table", [f"{told['table']}{form}, {told['rows']} rows"])
        there = f"{', '.join(told['image'])}: {there}"
    lines += paragraph("pictures", [there])
    some = [f"{row.id[:60]}: {row.why}" for row in missing[:SHOWN]]
    return lines + paragraph("missing", [*some, *others(len(missing))])


def labels(found: Survey) -> list[str]:
    """What counts as which disease, and what is left out."""
    diseases = Counter(row.disease for row in found.rows)
    lines = []
    for disease, n in diseases.most_common():
        spelled = [f"{name} ({k})" for name, k in found.told["labels"][disease].items()]
        lines.append(f"{n:6} {disease}: {', '.join(spelled)}")
    out = found.told["excluded"]
    many = sorted(out.items(), key=lambda item: -item[1])
    some = [f"{name or '(empty)'} ({n})" for name, n in many[: 2 * SHOWN]]
    said = [", ".join(some + others(len(out), 2 * SHOWN))] if out else []
    total = f"left out {sum(out.values())}" if out else ""
    return paragraph("labels", lines) + paragraph(total, said)


def groups(found: Survey) -> list[str]:
    """Which pictures stay together, those that look alike not counted."""
    sizes = Counter(splits.join([row.keys for row in found.rows]).tolist()).values()
    by = ", ".join(found.told.get("read_as", {}).get("groups", [])) or "no column"
    if "read_as" not in found.told:
        by = "folder and name"
    said = f"{by}: {len(sizes)} groups of at most {max(sizes, default=0)}"
    return paragraph("groups", [f"{said}; pictures that look alike are joined when they are read"])


def subgroups(found: Survey) -> list[str]:
    lines = []
    for column, counts in found.told.get("subgroups", {}).items():
        some = [f"{value} ({n})" for value, n in counts.items()]
        if len(some) > SHOWN:
            some = [f"{len(some)} values"]
        if unknown := len(found.rows) - sum(counts.values()):
            some.append(f"unknown ({unknown})")
        lines.append(f"{column}: {', '.join(some)}")
    unused = found.told.get("read_as", {}).get("not_used", [])
    return paragraph("subgroups", lines) + paragraph("not used", [", ".join(unused)])


def others(n: int, shown: int = SHOWN) -> list[str]:
    return [f"{n - shown} more"] if n > shown else []


def paragraph(title: str, lines: Sequence[str]) -> list[str]:
    """Lines beside a title, each wrapped; nothing where there are none."""
    found = []
    for line in filter(None, lines):
        clean = "".join(c if c.isprintable() else "?" for c in line)
        first = f"{title:<{MARGIN - 1}} " if not found else " " * MARGIN
        rest = " " * (MARGIN + 2)
        found += textwrap.wrap(clean, WIDTH, initial_indent=first, subsequent_indent=rest)
    return found
