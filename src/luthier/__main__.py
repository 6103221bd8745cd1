"""`python -m luthier`."""

from luthier.cli.start import main

main()
