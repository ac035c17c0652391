"""`python -m iterft_lite` is `iterft`, also where the command is not on the path."""

from iterft_lite.ui.cli import main

if __name__ == "__main__":  # a spawned process imports this module again
    main(prog_name="iterft")
