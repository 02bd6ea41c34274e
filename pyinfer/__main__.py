"""`python -m pyinfer` is `pyinfer-generate`."""

from pyinfer.cli import main

if __name__ == "__main__":
    main(prog_name="pyinfer-generate")
