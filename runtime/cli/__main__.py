"""`python -m magihuman.runtime.cli`: the commands without the export."""

from magihuman.runtime.cli.main import main

if __name__ == "__main__":
    main()
