"""The command behind tools/checkpoints."""

from __future__ import annotations

if __name__ == "__main__":
    from writers.command import main

    main()
