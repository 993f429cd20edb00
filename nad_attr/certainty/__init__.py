"""How sure is it? Tests of sub-architectures, and of each of their channels."""

from __future__ import annotations

from nad_attr.certainty.verdict import Verdict, verdict

__all__ = ["Verdict", "verdict"]
