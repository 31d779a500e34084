"""What would be read of a folder of photographs, on a page."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from derm_compress.data import splits
from derm_compress.data.labels import plain
from derm_compress.data.listing import many
from derm_compress.data.load import FOLDER
from derm_compress.data.preset import Preset, read_preset
from derm_compress.data.request import Request
from derm_compress.data.rows import Survey
from derm_compress.study.look.guess import every_label

WIDTH, MARGIN, SHOWN = 100, 12, 12  # of a line, of its title, values that are shown of many


def page(request: Request, found: Survey, report: Mapping, stops: Sequence[str]) -> str:
    """What a run of this request would read, group, map, split and leave out.

    report: of the pictures as they are, empty where none was opened; stops: what ends the run.
    """
    lines = [f"{request.data_root}, read as source {request.source}"]
    if request.source != FOLDER:
        lines += published(read_preset(request.source))
    lines += [*how(found), *labels(found), *groups(found, report), *subgroups(found)]
    lines += opened(found, report)
    lines += paragraph("notes", report.get("notes", found.told.get("notes", [])))
    lines += [f"{'WOULD STOP':<{MARGIN}}{line}" for line in stops]  # unwrapped: the run's words
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
    lines, column = [], ""
    if told:
        form = f" ({told['form']})" if told["form"] else ""
        lines += paragraph("table", [f"{told['table']}{form}, {many(told['rows'], 'row')}"])
        column = f"{', '.join(told['image'])}: "
    there = f"{len(missing)} of them missing" if missing else "all there"
    wanted = many(len(found.rows), "picture")
    lines += paragraph("pictures", [f"{column}{wanted} with a wanted label, {there}"])
    some = [f"{row.id[:60]}: {row.why}" for row in missing[:SHOWN]]
    return lines + paragraph("missing", [*some, *others(len(missing))])


def labels(found: Survey) -> list[str]:
    """What counts as which disease, what is left out, and what nobody knows."""
    diseases = Counter(row.disease for row in found.rows)
    lines = []
    for disease, n in diseases.most_common():
        spelled = [f"{name} ({k})" for name, k in found.told["labels"][disease].items()]
        lines.append(f"{n:6} {disease}: {', '.join(spelled)}")
    out, known = found.told["excluded"], every_label()
    none = {name: n for name, n in out.items() if known.get(plain(name)) == ""}
    rest = {name: n for name, n in out.items() if name not in none}
    said = [f"known, none of the eight diseases: {counts(none)}"] if none else []
    said += [f"as asked, or for another reason: {counts(rest)}"] if rest else []
    unknown = sum(found.unknown.values())
    return [
        *paragraph("labels", lines),
        *paragraph(f"left out {sum(out.values())}", said),
        *paragraph(f"unknown {unknown}", [counts(found.unknown)]),
    ]


def counts(values: Mapping[str, int]) -> str:
    """Values with how often they occur, the most frequent first."""
    first = sorted(values.items(), key=lambda item: -item[1])[: 2 * SHOWN]
    some = [f"{name or '(empty)'} ({n})" for name, n in first]
    return ", ".join(some + others(len(values), 2 * SHOWN))


def groups(found: Survey, report: Mapping) -> list[str]:
    """Which pictures stay together, by what is written and by how they look."""
    sizes = Counter(splits.join([row.keys for row in found.rows]).tolist()).values()
    by = ", ".join(found.told.get("read_as", {}).get("groups", [])) or "no column"
    if "read_as" not in found.told:
        by = "folder and name"
    said = f"{by}: {many(len(sizes), 'group')} of at most {max(sizes, default=0)}"
    alike = "pictures that look alike are joined when they are read"
    if report:
        grouped = many(report["groups"], "group")
        alike = f"with pictures that look alike {grouped} of at most {report['largest_group']}"
    return paragraph("groups", [f"{said}; {alike}"])


def subgroups(found: Survey) -> list[str]:
    lines = []
    for column, values in found.told.get("subgroups", {}).items():
        some = [f"{value} ({n})" for value, n in values.items()]
        if len(some) > SHOWN:
            some = [f"{len(some)} values"]
        if unknown := len(found.rows) - sum(values.values()):
            some.append(f"unknown ({unknown})")
        lines.append(f"{column}: {', '.join(some)}")
    unused = found.told.get("read_as", {}).get("not_used", [])
    return paragraph("subgroups", lines) + paragraph("not used", [", ".join(filter(None, unused))])


def opened(found: Survey, report: Mapping) -> list[str]:
    """What opening the pictures has shown: damaged ones, and how they would be split."""
    missing = {row.id for row in found.rows if row.path is None}
    damaged = [bad for bad in report.get("unreadable", ()) if bad["image"] not in missing]
    some = [f"{bad['image'][:60]}: {bad['reason']}" for bad in damaged[:SHOWN]]
    lines = paragraph("unreadable", [*some, *others(len(damaged))])
    for split, values in report.get("counts", {}).items():
        lines += paragraph(split, [f"{sum(values.values())}: {counts(values)}"])
    return lines


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
