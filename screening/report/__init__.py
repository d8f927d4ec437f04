"""The report of a screen: one self-contained HTML page that a biologist can open, read and pass on.

The page needs no network (its content security policy forbids any), follows the reader's light or
dark scheme, works by keyboard and screen reader, and says in a sentence what is missing where a
part of the screen is. Plates and matrices are tables, so that a reader who cannot see their
colours has their numbers; curves are SVG with their text in words; the map of cells and the
gallery of clips are drawn by the page's own script from data that stand in the page.
"""

from screening.report.clips import channel_colours
from screening.report.data import Example, ReportData
from screening.report.gallery import typical_cells
from screening.report.layout import embedding_map
from screening.report.matrices import moa_similarity
from screening.report.page import Live, content_policy, render

__all__ = [
    "Example",
    "Live",
    "ReportData",
    "channel_colours",
    "content_policy",
    "embedding_map",
    "moa_similarity",
    "render",
    "typical_cells",
]
