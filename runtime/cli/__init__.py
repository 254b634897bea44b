"""The `magihuman` command, but for `export`.

`main` binds the commands, which are in files by their names; `convert` has `tiny` too, `describe`
has `inspect`, `doctor` and `explain`. `options` makes parameters of dataclasses, `console` has
consoles, tables and exit codes, and `inspect` gathers the facts that `describe` prints.
"""
