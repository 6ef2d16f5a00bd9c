"""A plan as one HTML page that needs no network: `mwc.Plan.report` writes it.

    facts     what is said of a card of the drawing, and the rows of the table
    picture   drawings made ready for a page: ids, tips, no colours of their own
    charts    memory bars and timelines as shares of a plot
    colours   what the drawing's colours become on a dark ground
    page      all of it in the template, and the file

The templates (HTML, CSS, JavaScript apart) are package data in `templates`. The page
forbids itself every request and every script but its own (a content security policy),
and works without its script: the drawing is then a picture and the table is open.
"""

from mwc.report.page import check_path, html, write

__all__ = ["check_path", "html", "write"]
