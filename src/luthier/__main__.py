"""`python -m luthier`."""

from luthier.cli.main import main

main()
