"""`python -m skipwise` is the command line."""

from skipwise.cli import main

main()
