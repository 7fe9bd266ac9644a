"""`python -m preceptor`: the same as the command `preceptor`."""

from preceptor.cli import main

main()
