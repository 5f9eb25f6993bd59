"""`jupyter nbconvert --to html NOTEBOOK`, called in this folder, writes a page that needs no network."""

from savelib.show.page import OPTIONS

c = get_config()  # noqa: F821, given by jupyter
c.HTMLExporter.update(OPTIONS)
