"""The report: everything that a file of gates says, on one page to look at.

``Report("gates.h5").save("report.html")`` writes a page that needs no network: summary, the
architecture view (which channels a class keeps, and what two classes share), measures beside
rivals, overlaps, curves, mosaics, errors, channels with their images and concepts, statistics, and
where everything comes from. Needs ``pip install 'nad-attr[report]'``.
"""

from nad_attr.report.report import Report

__all__ = ["Report"]
