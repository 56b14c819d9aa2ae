"""The service: ``pyinf serve STORE`` answers queries over HTTP. See docs/serve.md.

``engine`` knows nothing of HTTP, ``security`` nothing of searching, ``guard`` keeps out what must not come in, ``app``
puts them together, ``server`` listens. ``app``, ``schemas`` and ``server`` need fastapi and uvicorn
(``pip install pyinf[serve]``).
"""

from __future__ import annotations

from pyinf.serve.engine import Answer, Busy, Engine, Hit, Query, Refused, Searcher, Stopped
from pyinf.serve.limits import Limits

__all__ = ["Answer", "Busy", "Engine", "Hit", "Limits", "Query", "Refused", "Searcher", "Stopped"]
