"""How Sphinx makes a website of these pages; `make docs` runs it, with warnings as errors."""

from bov_lightning.version import __version__ as release

project = "bov-lightning"
extensions = ["myst_parser"]
# So that a code host shows the same page at the top of the folder.
root_doc = "README"
nitpicky = True
# Links to a heading, as in keys.md#modelconfig, are checked.
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"bov-lightning {release}"
html_show_copyright = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
