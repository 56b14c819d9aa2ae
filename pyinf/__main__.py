"""``python -m pyinf``: the command line; on its own, what runs here and why not."""

from __future__ import annotations

import sys


def main() -> int:
    """With arguments: the command line. Without: :func:`pyinf.doctor.doctor`."""
    if len(sys.argv) > 1:
        from pyinf.cli import main as command_line

        command_line()
    from pyinf.doctor import doctor

    print(doctor())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
