"""`python -m geohooks.cli`, as launchers of several processes start it."""

from __future__ import annotations

from geohooks.cli.application import main

if __name__ == "__main__":
    main()
