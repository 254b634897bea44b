"""`python -m magihuman`: the `magihuman` command, where no script of it is on the path."""

try:
    from magihuman.export.cli import main
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("magihuman.export"):
        raise
    from magihuman.runtime.cli.main import main  # the export was left out

if __name__ == "__main__":
    main()
