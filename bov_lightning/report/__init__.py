"""`bov report`: curves, tables and the paper's figures from run directories.

    reading     run directories, whoever made them -> Run, or why not
    statistics  means and differences over seeds, with intervals
    comparison  which runs share an axis, and which are one row but for their seed
    content     tables and plots as data: every format shows the same numbers
    tables, plots  what is in them
    palette     colours and dashes of rows
    drawing     plots as SVG that follows the page's theme, and as PNG
    page        HTML, Markdown, CSV and PNG files

Nothing here imports torch: a report opens as fast as its files are read.
"""

from pathlib import Path
from typing import Literal, get_args

from bov_lightning.errors import UserError

Format = Literal["html", "md", "csv", "png"]


def write_report(
    runs: list[Path], output: Path, format: Format = "html", baseline: str | None = None
) -> str:
    """Writes a report of any set of runs.

    Args:
        runs: run directories, or folders of run directories.
        output: the file to write; a directory for csv (every table and plot) and png (every plot).
        format: html is one page that needs no network.
        baseline: what differences are taken to, the name of a run or of a row such as
            ``standard``; None: the first run.

    Returns:
        One line about what was written.

    Raises:
        UserError: no runs, a path that is none, an unknown baseline or format, or an output that
            cannot be written. What is wrong *inside* a run is listed in the report instead.
    """
    from bov_lightning.report.comparison import compare
    from bov_lightning.report.page import WRITERS
    from bov_lightning.report.reading import read_runs
    from bov_lightning.report.tables import make_report

    if format not in get_args(Format):
        raise UserError(f"--format {format}: use one of {', '.join(get_args(Format))}")
    if output.is_dir() and format in ("html", "md"):
        raise UserError(f"--output {output} is a directory: give a file, such as report.{format}")
    if output.is_file() and format in ("csv", "png"):
        raise UserError(f"--output {output} is a file: --format {format} writes a directory")
    usable, unusable = read_runs(runs)
    report = make_report(compare(usable, baseline), unusable)
    WRITERS[format](report, output)
    return f"{output}: {report.summary}"
