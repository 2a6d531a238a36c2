"""Settings of Sphinx for the documentation site."""

import re
from pathlib import Path

project = "Stratagem"
copyright = "The Stratagem authors"
version = re.search(r'__version__ = "(.*)"', (Path(__file__).parents[2] / "src/stratagem/_version.py").read_text())[1]
release = version

extensions = ["myst_parser", "sphinx_copybutton", "sphinx_design"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/*.txt"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = [
    # Blocks with shell commands and other text are marked as Python only if they are.
    "misc.highlighting_failure",
]
highlight_language = "text"
python_maximum_signature_line_length = 88
toc_object_entries = False
add_module_names = False
# Options such as --set are not dashes.
smartquotes = False

html_theme = "furo"
html_title = f"Stratagem {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2456a6", "color-brand-content": "#2456a6"},
    "dark_css_variables": {"color-brand-primary": "#8ab4f8", "color-brand-content": "#8ab4f8"},
}
copybutton_exclude = ".linenos, .gp, .go"
