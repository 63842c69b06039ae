"""`dbcore toybench`: training settings, compared over subjects of which the truth is known."""

from dbcore.toybench.bench import HELP, add_arguments, main

__all__ = ["HELP", "add_arguments", "main"]
