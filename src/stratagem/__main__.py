"""The entry point of ``python -m stratagem``."""

from stratagem.cli.main import main

if __name__ == "__main__":
    main()
