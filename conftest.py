"""Pictures in notebooks are compared too, whenever pytest runs with --nbval."""

pytest_plugins = ["notebook_pictures"]
