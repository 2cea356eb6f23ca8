"""The report as files: a page, Markdown, CSV, PNG."""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from bov_lightning.files import write_file
from bov_lightning.report import palette
from bov_lightning.report.content import (
    Plot,
    Report,
    Section,
    Table,
    plot_csv,
    shown,
    sort_key,
    table_csv,
    thinned,
)
from bov_lightning.version import __version__

FOLDER = Path(__file__).parent


def html(report: Report) -> str:
    """One page that needs nothing else, and is allowed nothing else."""
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        report=report,
        version=__version__,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        blocks=_blocks,
        shown=shown,
        sort_key=sort_key,
        csv_of=lambda table: _data_uri("text/csv;charset=utf-8", table_csv(table)),
        drawn=_drawn,
        dashes=palette.dashes,
        colour=palette.colour,
    )


def _blocks(section: Section) -> list[Table | list[Plot]]:
    """The items of a section, with plots that follow each other in one list.

    Rankings, which grow with the number of rows, stand beside rankings only.
    """
    blocks: list[Table | list[Plot]] = []
    for item in section.items:
        if isinstance(item, Table):
            blocks.append(item)
        elif (
            blocks
            and isinstance(blocks[-1], list)
            and (item.kind == "ranking") == (blocks[-1][-1].kind == "ranking")
        ):
            blocks[-1].append(item)
        else:
            blocks.append([item])
    return blocks


def _drawn(plot: Plot) -> dict[str, str | bool | Markup]:
    """A plot's picture and files."""
    from bov_lightning.report import drawing

    points = thinned(plot)
    picture = base64.b64encode(drawing.png(plot)).decode()
    return {
        # Made by matplotlib and serialised by ElementTree, which escape what is text.
        "svg": Markup(drawing.svg(plot)),
        "csv": _data_uri("text/csv;charset=utf-8", plot_csv(points)),
        "png": f"data:image/png;base64,{picture}",
        "thinned": points is not plot,
    }


def _data_uri(kind: str, text: str) -> str:
    return f"data:{kind},{quote(text, safe=' ,.:;()+-_/')}"


def markdown(report: Report) -> str:
    """All tables and remarks."""
    lines = [f"# {report.title}", "", f"{_escaped(report.summary)}."]
    for section in report.sections:
        lines += ["", f"## {section.title}"]
        for text in section.text:
            lines += ["", _escaped(text)]
        for table in (item for item in section.items if isinstance(item, Table)):
            lines += ["", f"### {table.title}", "", *_table(table)]
            if table.note:
                lines += ["", _escaped(table.note)]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(map(_escaped, cells))} |"

    return [
        line([column.name for column in table.columns]),
        f"| {' | '.join('---:' if column.spec else '---' for column in table.columns)} |",
        *(
            line([shown(cell, column) for cell, column in zip(row, table.columns, strict=True)])
            for row in table.rows
        ),
    ]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_<>|[]#~" else c for c in text)


def _write_html(report: Report, output: Path) -> None:
    write_file(output, html(report))


def _write_markdown(report: Report, output: Path) -> None:
    write_file(output, markdown(report))


def _write_csv(report: Report, output: Path) -> None:
    for table in report.tables:
        write_file(output / f"{table.slug}.csv", table_csv(table))
    for plot in report.plots:
        write_file(output / f"{plot.slug}.csv", plot_csv(plot))


def _write_png(report: Report, output: Path) -> None:
    from bov_lightning.report import drawing

    for plot in report.plots:
        picture = drawing.png(plot)
        write_file(output / f"{plot.slug}.png", lambda file, picture=picture: file.write(picture))


WRITERS: dict[str, Callable[[Report, Path], None]] = {
    "html": _write_html,
    "md": _write_markdown,
    "csv": _write_csv,
    "png": _write_png,
}
