"""`jupyter nbconvert --config THIS --to html NOTEBOOK` writes a page that needs no network."""

from savelib.show.page import OPTIONS

c = get_config()  # noqa: F821, given by jupyter
c.HTMLExporter.update(OPTIONS)
