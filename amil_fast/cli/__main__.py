"""``python -m amil_fast.cli``: the command under launchers that start modules (``torchrun -m``)."""

from amil_fast.cli import main

main()
